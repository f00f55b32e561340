"""Samplers that drop tokens or change their logits: top-k, top-p, min-p, temperature. uncommon.py has more.

Each maps candidates to candidates, as llama.cpp's sampler of that name does. A sampler runs once per token, on up to
262,144 candidates, so none sorts more than it must. Top-k comes early; the samplers behind it see few candidates.
"""

import math
import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gguf_run.runtime.sampling.params import SamplingParams

Breakers = Mapping[int, tuple[tuple[int, ...], ...]]  # see history.breakers

GREEDY = 1e-20  # temperatures below this take the best token
EXACT = 4096  # up to this many candidates are computed in float64, more in float32
N_STEP = 512  # steps into which reaching divides a logit of 1
MAX_STEP = 1 << 14  # the last of these steps; it takes all logits farther below the largest


class Candidates(NamedTuple):
    """Tokens that may still be chosen. The arrays are never written to."""

    logits: NDArray[np.floating]  # f32 or f64
    ids: NDArray[np.intp] | None = None  # None: all tokens of the vocabulary, in order
    is_sorted: bool = False  # the largest logit comes first

    def id(self, i: int) -> int:
        """Return the token id of candidate i."""
        return i if self.ids is None else int(self.ids[i])

    def take(self, chosen: "NDArray[np.intp] | NDArray[np.bool_] | slice", is_sorted: bool) -> "Candidates":
        """Return some of the candidates, by indices, a mask or a slice."""
        at = np.arange(len(self.logits))[chosen] if isinstance(chosen, slice) else chosen
        at = np.flatnonzero(at) if at.dtype == np.bool_ else at.astype(np.intp, copy=False)
        return Candidates(self.logits[at], at if self.ids is None else self.ids[at], is_sorted)

    def probabilities(self) -> NDArray[np.floating]:
        """Return the softmax of the logits."""
        logits = self.logits.astype(np.float64) if len(self.logits) <= EXACT else self.logits
        weights = logits - logits.max()
        np.exp(weights, out=weights)  # in place: new memory costs more time than the arithmetic
        weights /= weights.sum(dtype=np.float64).astype(weights.dtype)
        return weights


@dataclass
class State:
    """What samplers see besides the candidates."""

    random: random.Random
    recent: deque[int]  # the last tokens of the context, the last one at the end
    breakers: Breakers = field(default_factory=dict)


def top_k(candidates: Candidates, params: SamplingParams, _: State) -> Candidates:
    """Keep the k most likely."""
    return head(candidates, params.top_k)


def top_p(candidates: Candidates, params: SamplingParams, _: State) -> Candidates:
    """Keep the fewest most likely tokens that have this probability together (Holtzman et al. 2019)."""
    if candidates.is_sorted:
        cumulative = candidates.probabilities().astype(np.float64).cumsum()
        return candidates.take(slice(int(cumulative.searchsorted(params.top_p)) + 1), True)
    return candidates.take(reaching(candidates.logits, candidates.probabilities(), params.top_p, "left"), False)


def min_p(candidates: Candidates, params: SamplingParams, _: State) -> Candidates:
    """Keep tokens that are at least this fraction as likely as the best one."""
    likely = candidates.logits >= candidates.logits.max() + math.log(params.min_p)
    return candidates.take(likely, candidates.is_sorted)


def temperature(candidates: Candidates, params: SamplingParams, _: State) -> Candidates:
    """Divide the logits by the temperature.

    With a range the divisor follows the entropy of the candidates: from temperature - range where one token is
    certain to temperature + range where all are equally likely.
    """
    divisor = params.temperature
    if params.dynatemp_range > 0:
        if len(candidates.logits) == 1:
            return candidates
        probabilities = candidates.probabilities()
        share = surprises(probabilities)[1] / math.log(len(probabilities))
        low, high = max(0.0, divisor - params.dynatemp_range), divisor + params.dynatemp_range
        divisor = low + (high - low) * min(1.0, max(0.0, share)) ** params.dynatemp_exponent
    if divisor < GREEDY:
        return candidates.take(np.array([int(candidates.logits.argmax())]), True)
    logits = candidates.logits.astype(np.float64) if divisor < 1e-3 else candidates.logits  # out of float32's range
    logits = logits / logits.dtype.type(min(divisor, 1e30))
    if not np.isfinite(logits.max()):  # the logits are too far apart: only the best token can come
        return head(candidates, 1)
    return candidates._replace(logits=logits)


def head(candidates: Candidates, k: int) -> Candidates:
    """Keep the k most likely candidates, in order, without those that cannot come (-inf)."""
    return candidates.take(slice(k) if candidates.is_sorted else largest(candidates.logits, k), True)


def largest(values: NDArray[np.floating], k: int) -> NDArray[np.intp]:
    """Return the indices of the k largest values, the largest first; of equal values, the first comes first.

    -inf does not count, unless all values are -inf.
    Take the maxima of at least k disjoint groups: at least k values are no smaller than the k-th largest maximum. So
    only values from this bound up are sorted. Groups are the columns of a matrix: one vectorized pass finds the maxima.
    """
    k = min(k, len(values))
    n_group = max(2 * k, len(values) // 64)
    n_row = len(values) // n_group
    if n_row > 1:
        maxima = values[: n_row * n_group].reshape(n_row, n_group).max(axis=0)
        bound = np.partition(maxima, n_group - k)[n_group - k]
    else:
        bound = np.partition(values, len(values) - k)[len(values) - k]
    at = np.flatnonzero(values >= bound if bound > -np.inf else values > -np.inf)
    if len(at) > 4 * k:  # many values equal the bound: the first k of them are enough
        is_above = values[at] > bound
        at = np.concatenate([at[is_above], at[~is_above][:k]])
    return at[np.argsort(-values[at], kind="stable")[:k]]


def reaching(
    values: NDArray[np.floating], weights: NDArray[np.floating], wanted: float, side: Literal["left", "right"]
) -> "NDArray[np.intp] | NDArray[np.bool_]":
    """Return the places of the fewest largest values whose weights reach `wanted` (side "right": exceed it).

    A few values are nearly always enough, so only a head of the values is sorted. If the head is not enough, the values
    are counted in small steps below the largest one; only the step in which the sum reaches `wanted` is sorted.
    """
    first = largest(values, EXACT)
    cumulative = weights[first].astype(np.float64).cumsum()
    if cumulative[-1] > wanted or len(first) < EXACT:
        return first[: int(cumulative.searchsorted(wanted, side=side)) + 1]
    distance = values[first[0]] - values
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


def surprises(probabilities: NDArray[np.floating]) -> tuple[NDArray[np.floating], float]:
    """Return the surprise of each token, -log p but 0 where p is 0, and its expected value, the entropy."""
    surprise = -np.log(probabilities, out=np.zeros_like(probabilities), where=probabilities > 0)
    return surprise, float((probabilities * surprise).sum(dtype=np.float64))
