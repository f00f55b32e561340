"""Samplers that are off unless somebody asks for them: typical, top-n-sigma, XTC. See filters.py."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gguf_run.runtime.sampling.candidates import EXACT, Candidates, State, largest, uniform
from gguf_run.runtime.sampling.params import SamplingParams

N_STEP = 512  # steps into which reaching divides a logit of 1
MAX_STEP = 1 << 14  # the last of these steps; it takes all logits farther below the largest


def typical(candidates: Candidates, params: SamplingParams, _: State) -> Candidates:
    """Keep the fewest tokens nearest to the expected surprise that have this probability (Meister et al. 2022)."""
    probabilities = candidates.probabilities()
    surprise, entropy = surprises(probabilities)
    distance = np.abs(surprise - entropy)
    distance[probabilities == 0] = np.inf
    return candidates.take(reaching(-distance, probabilities, params.typical_p, "right"), False)


def top_n_sigma(candidates: Candidates, params: SamplingParams, _: State) -> Candidates:
    """Forbid logits more than n standard deviations below the largest (Tang et al. 2024)."""
    logits = candidates.logits
    if len(logits) == 1:
        return candidates
    sigma = logits[np.isfinite(logits)].std(dtype=np.float64)
    too_low = logits < logits.max() - params.top_n_sigma * sigma
    return candidates._replace(logits=np.where(too_low, logits.dtype.type(-np.inf), logits))


def xtc(candidates: Candidates, params: SamplingParams, state: State) -> Candidates:
    """Exclude top choices: with some probability, drop the tokens above a threshold, except the least likely one."""
    if len(candidates.logits) < 2 or uniform(state.seed, state.n_past, stream=1) > params.xtc_probability:
        return candidates
    probabilities = candidates.probabilities()
    above = (probabilities >= params.xtc_threshold) & (probabilities > 0)  # a forbidden token is no choice
    at = np.flatnonzero(above)[::-1]
    if len(at) > 1:
        above[at[candidates.logits[at].argmin()]] = False  # among equals, the last one
        candidates = candidates.take(~above, candidates.is_sorted)
    return candidates


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
