"""Samplers that are off unless somebody asks for them: typical, top-n-sigma, XTC. See filters.py."""

import numpy as np

from gguf_run.runtime.sampling.filters import Candidates, State, reaching, surprises
from gguf_run.runtime.sampling.params import SamplingParams


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
    if len(candidates.logits) < 2 or state.random.random() > params.xtc_probability:
        return candidates
    probabilities = candidates.probabilities()
    above = (probabilities >= params.xtc_threshold) & (probabilities > 0)  # a forbidden token is no choice
    at = np.flatnonzero(above)[::-1]
    if len(at) > 1:
        above[at[candidates.logits[at].argmin()]] = False  # among equals, the last one
        candidates = candidates.take(~above, candidates.is_sorted)
    return candidates
