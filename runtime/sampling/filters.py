"""Samplers that drop tokens or change their logits: top-k, top-p, min-p, temperature. uncommon.py has more.

Each maps candidates to candidates, as llama.cpp's sampler of that name does. A sampler runs once per token, on up to
262,144 candidates, so none sorts more than it must. Top-k comes early; the samplers behind it see few candidates.
"""

import math

import numpy as np

from gguf_run.runtime.sampling.candidates import EXACT, Candidates, State, head
from gguf_run.runtime.sampling.params import SamplingParams

GREEDY = 1e-20  # temperatures below this take the best token


def top_k(candidates: Candidates, params: SamplingParams, _: State) -> Candidates:
    """Keep the k most likely."""
    return head(candidates, params.top_k)


def top_p(candidates: Candidates, params: SamplingParams, _: State) -> Candidates:
    """Keep the fewest most likely tokens that have this probability together (Holtzman et al. 2019)."""
    if candidates.is_sorted:
        cumulative = candidates.probabilities().astype(np.float64).cumsum()
        return candidates.take(slice(int(cumulative.searchsorted(params.top_p)) + 1), True)
    from gguf_run.runtime.sampling.uncommon import reaching

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
        from gguf_run.runtime.sampling.uncommon import surprises

        probabilities = candidates.probabilities()
        share = surprises(probabilities)[1] / math.log(len(probabilities))
        low, high = max(0.0, divisor - params.dynatemp_range), divisor + params.dynatemp_range
        divisor = low + (high - low) * min(1.0, max(0.0, share)) ** params.dynatemp_exponent
    if divisor < GREEDY:
        return candidates.take(np.array([int(candidates.logits.argmax())]), True)
    is_float32 = len(candidates.logits) > EXACT and divisor >= 1e-3  # less leads out of its range
    logits = candidates.logits if is_float32 else candidates.logits.astype(np.float64)
    logits = logits / logits.dtype.type(min(divisor, 1e30))
    if not np.isfinite(logits.max()):  # the logits are too far apart: only the best token can come
        return head(candidates, 1)
    return candidates._replace(logits=logits)
