"""What is noted of a chosen token: its log-probability, and what mirostat and adaptive-p learn from it."""

import math

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.frozen import frozen
from gguf_run.runtime.sampling.candidates import largest


@frozen
class TokenLogprob:
    """Natural logarithms of probabilities where a token was chosen, before any bias, processor or sampler."""

    id: int  # the token
    logprob: float  # of the token
    top: tuple[tuple[int, float], ...]  # the most likely tokens with theirs


class Choice(int):
    """The id of a token, and what Sampler.accept notes besides."""

    logprob: TokenLogprob | None = None  # if SamplingParams.logprobs asks for it
    probability = 0.0  # in the distribution that Sampler's selector looks at; 0 without a selector

    @classmethod
    def of(cls, logits: NDArray[np.float32], id: int, n: int, log_sum: float | None = None) -> "Choice":
        """Return a token with its log-probability and those of the n most likely ones.

        log_sum: log(sum(exp(logits))), if it is known.
        """
        choice = cls(id)
        if log_sum is None:
            most = float(logits.max())
            log_sum = most + math.log(np.exp(logits - most).sum(dtype=np.float64))
        top = [int(other) for other in largest(logits, n)] if n else []
        logprobs = [float(logits[other]) - log_sum for other in (id, *top)]
        choice.logprob = TokenLogprob(id, logprobs[0], tuple(zip(top, logprobs[1:], strict=True)))
        return choice
