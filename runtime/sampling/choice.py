"""What is noted of a chosen token: its log-probability, and what mirostat and adaptive-p learn from it."""

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.frozen import frozen
from gguf_run.runtime.sampling.candidates import Candidates, largest

if TYPE_CHECKING:
    from gguf_run.runtime.sampling.select import AdaptiveP, Mirostat


@frozen
class TokenLogprob:
    """Natural logarithms of probabilities where a token was chosen, before any bias, processor or sampler."""

    id: int  # the token
    logprob: float  # of the token
    top: tuple[tuple[int, float], ...]  # the most likely tokens with theirs


class Choice(int):
    """The id of a token, and what Sampler.accept notes besides."""

    logprob: TokenLogprob | None  # if SamplingParams.logprobs asks for it
    probability: float  # in the distribution that Sampler's selector looks at; 0 without a selector

    def __new__(cls, id: int, logprob: TokenLogprob | None, probability: float = 0.0) -> "Choice":
        choice = super().__new__(cls, id)
        choice.logprob, choice.probability = logprob, probability
        return choice

    def note(self, selector: "AdaptiveP | Mirostat | None", logprobs: list[TokenLogprob]) -> None:
        """Tell the selector, and append the log-probability."""
        if selector is not None:
            selector.chosen(self.probability)
        if self.logprob is not None:
            logprobs.append(self.logprob)


def logprob_of(
    logits: NDArray[np.float32] | Candidates, id: int, n: int, log_sum: float | None = None
) -> TokenLogprob | None:
    """Return the log-probabilities of a token and of the n most likely ones. None without all logits, f32[n_vocab].

    log_sum: log(sum(exp(logits))), if it is known.
    """
    if isinstance(logits, Candidates):
        return None
    if log_sum is None:
        most = float(logits.max())
        log_sum = most + math.log(np.exp(logits - most).sum(dtype=np.float64))
    top = tuple((int(other), float(logits[other]) - log_sum) for other in (largest(logits, n) if n else ()))
    return TokenLogprob(id, float(logits[id]) - log_sum, top)
