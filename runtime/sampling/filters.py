"""Samplers that take tokens away or bend their logits: top-k, top-p, min-p, typical, top-n-sigma, XTC, temperature.

Each maps candidates to candidates, as llama.cpp's sampler of that name does. The vocabulary has up to 262,144 tokens
and this runs once per token, so nothing here sorts more than it must: top-k comes early, and what follows it is small.
"""

import math
import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gguf_run.runtime.sampling.params import SamplingParams

Side = Literal["left", "right"]

GREEDY = 1e-20  # temperatures below this take the best token
EXACT = 4096  # so many candidates are computed in float64, more in float32
N_STEP, MAX_STEP = 512, 1 << 14  # of a logit; of all, the last one takes the rest


class Candidates(NamedTuple):
    """Tokens that may still come, and their logits f32 or f64. ids: None for the whole vocabulary, in its order.

    is_sorted: the largest logit comes first. Arrays are never written to.
    """

    logits: NDArray[np.floating]
    ids: NDArray[np.intp] | None = None
    is_sorted: bool = False

    def id(self, i: int) -> int:
        """Token id of candidate i."""
        return i if self.ids is None else int(self.ids[i])

    def take(self, chosen: "NDArray[np.intp] | NDArray[np.bool_] | slice", is_sorted: bool) -> "Candidates":
        """Those of an index, a mask or a slice."""
        at = np.arange(len(self.logits))[chosen] if isinstance(chosen, slice) else chosen
        at = np.flatnonzero(at) if at.dtype == np.bool_ else at.astype(np.intp, copy=False)
        return Candidates(self.logits[at], at if self.ids is None else self.ids[at], is_sorted)

    def probabilities(self) -> NDArray[np.floating]:
        """Softmax of the logits."""
        logits = self.logits.astype(np.float64) if len(self.logits) <= EXACT else self.logits
        weights = logits - logits.max()
        np.exp(weights, out=weights)  # in place: fresh memory costs more than the arithmetic
        weights /= weights.sum(dtype=np.float64).astype(weights.dtype)
        return weights


@dataclass
class State:
    """What samplers see besides the candidates. recent: tokens of the context, the last one last. breakers: see dry.py;
    a token that begins one, and what then follows it."""

    random: random.Random
    recent: deque[int]
    breakers: Mapping[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)


def top_k(candidates: Candidates, params: "SamplingParams", _: State) -> Candidates:
    """Keep the k most likely."""
    return head(candidates, params.top_k)


def top_p(candidates: Candidates, params: "SamplingParams", _: State) -> Candidates:
    """Keep the fewest that together have this probability (Holtzman et al. 2019)."""
    if candidates.is_sorted:
        cumulative = candidates.probabilities().astype(np.float64).cumsum()
        return candidates.take(slice(int(cumulative.searchsorted(params.top_p)) + 1), True)
    return candidates.take(_reaching(candidates.logits, candidates.probabilities(), params.top_p, "left"), False)


def min_p(candidates: Candidates, params: "SamplingParams", _: State) -> Candidates:
    """Keep what is at least this fraction as likely as the best."""
    likely = candidates.logits >= candidates.logits.max() + math.log(params.min_p)
    return candidates.take(likely, candidates.is_sorted)


def typical(candidates: Candidates, params: "SamplingParams", _: State) -> Candidates:
    """Keep the tokens whose surprise is nearest to the expected one (Meister et al. 2022), until they have this
    probability."""
    probabilities = candidates.probabilities()
    surprise = _surprise(probabilities)
    distance = np.abs(surprise - _entropy(probabilities, surprise))
    distance[probabilities == 0] = np.inf
    return candidates.take(_reaching(-distance, probabilities, params.typical_p, "right"), False)


def top_n_sigma(candidates: Candidates, params: "SamplingParams", _: State) -> Candidates:
    """Forbid logits more than n standard deviations below the largest (Tang et al. 2024)."""
    logits = candidates.logits
    if len(logits) == 1:
        return candidates
    sigma = logits[np.isfinite(logits)].std(dtype=np.float64)
    too_low = logits < logits.max() - params.top_n_sigma * sigma
    return candidates._replace(logits=np.where(too_low, logits.dtype.type(-np.inf), logits))


def xtc(candidates: Candidates, params: "SamplingParams", state: State) -> Candidates:
    """Exclude top choices: now and then, drop all tokens above a threshold but the least likely of them."""
    if len(candidates.logits) < 2 or state.random.random() > params.xtc_probability:
        return candidates
    probabilities = candidates.probabilities()
    above = (probabilities >= params.xtc_threshold) & (probabilities > 0)  # a forbidden token is no choice
    at = np.flatnonzero(above)[::-1]
    if len(at) > 1:
        above[at[candidates.logits[at].argmin()]] = False  # among equals, the one that came last
        candidates = candidates.take(~above, candidates.is_sorted)
    return candidates


def temperature(candidates: Candidates, params: "SamplingParams", _: State) -> Candidates:
    """Divide the logits. With a range, by more where the model is unsure: from temperature - range at no entropy to
    temperature + range at the highest."""
    divisor = params.temperature
    if params.dynatemp_range > 0:
        if len(candidates.logits) == 1:
            return candidates
        probabilities = candidates.probabilities()
        share = _entropy(probabilities, _surprise(probabilities)) / math.log(len(probabilities))
        low, high = max(0.0, divisor - params.dynatemp_range), divisor + params.dynatemp_range
        divisor = low + (high - low) * min(1.0, max(0.0, share)) ** params.dynatemp_exponent
    if divisor < GREEDY:
        return candidates.take(np.array([int(candidates.logits.argmax())]), True)
    logits = candidates.logits.astype(np.float64) if divisor < 1e-3 else candidates.logits  # out of float32's range
    logits = logits / logits.dtype.type(min(divisor, 1e30))
    if not np.isfinite(logits.max()):  # so far apart that only the best can come
        return head(candidates, 1)
    return candidates._replace(logits=logits)


def head(candidates: Candidates, k: int) -> Candidates:
    """The k most likely in order; of those that cannot come (-inf), none."""
    return candidates.take(slice(k) if candidates.is_sorted else largest(candidates.logits, k), True)


def largest(values: NDArray[np.floating], k: int) -> NDArray[np.intp]:
    """Return where the k largest stand, largest first, the first one first among equals; -inf only if all are.

    At least k values are no smaller than the k-th largest of the maxima of >= k disjoint groups, so only values from
    that bound up are sorted. Groups are the columns of a matrix: their maxima are one vectorized pass.
    """
    k = min(k, len(values))
    n_group = max(2 * k, len(values) // 64)
    n_row = len(values) // n_group
    if n_row > 1:
        maxima = values[: n_row * n_group].reshape(n_row, n_group).max(axis=0)
        bound = np.partition(maxima, n_group - k)[n_group - k]
    else:
        bound = np.partition(values, len(values) - k)[len(values) - k]
    found = np.flatnonzero(values >= bound if bound > -np.inf else values > -np.inf)
    if len(found) > 4 * k:  # many equals: the first ones do
        is_above = values[found] > bound
        found = np.concatenate([found[is_above], found[~is_above][:k]])
    return found[np.argsort(-values[found], kind="stable")[:k]]


def _reaching(
    values: NDArray[np.floating], weights: NDArray[np.floating], wanted: float, side: Side
) -> "NDArray[np.intp] | NDArray[np.bool_]":
    """Where the largest values stand whose weights add up to what is wanted ("left") or more ("right").

    They are nearly always few: sort a head of them. If they are not, tell by their number in each of many steps
    where the last one stands, and sort only those of that step.
    """
    found = largest(values, EXACT)
    cumulative = weights[found].astype(np.float64).cumsum()
    if cumulative[-1] > wanted or len(found) < EXACT:
        return found[: int(cumulative.searchsorted(wanted, side=side)) + 1]
    distance = values[found[0]] - values
    distance *= N_STEP
    steps = np.minimum(distance, MAX_STEP, out=distance).astype(np.intp)
    cumulative = np.bincount(steps, weights).cumsum()
    last = min(int(cumulative.searchsorted(wanted, side=side)), len(cumulative) - 1)
    inside = np.flatnonzero(steps == last)
    inside = inside[np.argsort(-values[inside], kind="stable")]
    before = cumulative[last] - weights[inside].sum(dtype=np.float64)
    n = int((before + weights[inside].astype(np.float64).cumsum()).searchsorted(wanted, side=side)) + 1
    chosen = steps < last
    chosen[inside[:n]] = True
    return chosen


def _surprise(probabilities: NDArray[np.floating]) -> NDArray[np.floating]:
    """-log p; 0 where p is 0, so that it counts for nothing in an entropy."""
    return -np.log(probabilities, out=np.zeros_like(probabilities), where=probabilities > 0)


def _entropy(probabilities: NDArray[np.floating], surprise: NDArray[np.floating]) -> float:
    return float((probabilities * surprise).sum(dtype=np.float64))
