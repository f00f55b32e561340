"""Perplexity: exp of the mean of -log p over the scored tokens, with its standard error."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguf_run.runtime.evaluate.text import Block, Chunk, Scorer, check_finite


@dataclass(frozen=True)
class Perplexity:
    """The perplexity over some chunks."""

    n_chunk: int = 0
    n_scored: int = 0  # tokens
    total: float = 0.0  # sum of -log p
    total2: float = 0.0  # sum of (log p)^2

    @property
    def mean(self) -> float:
        return self.total / self.n_scored

    @property
    def value(self) -> float:
        return math.exp(self.mean)

    @property
    def error(self) -> float:
        """Standard error of the value: the error of the mean times the slope of exp; nan for a single token."""
        if self.n_scored < 2:
            return math.nan
        variance = max(0.0, self.total2 / self.n_scored - self.mean**2)
        return self.value * math.sqrt(variance / (self.n_scored - 1))

    def plus(self, nll: NDArray[np.float64]) -> "Perplexity":
        """Return the perplexity over one more chunk. nll: -log p of its tokens. GgufRunError if nll is not finite."""
        number = self.n_chunk + 1
        check_finite(nll, f"chunk {number}")
        return Perplexity(number, self.n_scored + len(nll), self.total + nll.sum(), self.total2 + (nll * nll).sum())


def perplexity(
    scorer: Scorer, chunks: Sequence[Chunk], see: Callable[[Block], None] = lambda block: None
) -> Iterator[Perplexity]:
    """Yield the perplexity over all chunks so far, after each chunk.

    see: gets each block of scores while its logits are valid. GgufRunError if logits are not finite.
    """
    done = Perplexity()
    for chunk in chunks:
        parts = []
        for block in scorer.run(chunk.ids, chunk.targets):
            see(block)
            parts.append(block.nll)
        done = done.plus(np.concatenate(parts))
        yield done
