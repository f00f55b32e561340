"""Perplexity: exp of the mean of -log p over the scored tokens, with its standard error."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguf_run.runtime.evaluate.text import Block, Chunk, Scorer, check_finite


@dataclass(frozen=True)
class Perplexity:
    """Over n_chunk chunks, n_scored tokens. total, total2: sums of -log p and of its square."""

    n_chunk: int = 0
    n_scored: int = 0
    total: float = 0.0
    total2: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.n_scored

    @property
    def value(self) -> float:
        return math.exp(self.mean)

    @property
    def error(self) -> float:
        """Standard error of the value: that of the mean, carried through exp."""
        if self.n_scored < 2:
            return math.nan
        variance = max(0.0, self.total2 / self.n_scored - self.mean**2)
        return self.value * math.sqrt(variance / (self.n_scored - 1))

    def plus(self, nll: NDArray[np.float64]) -> "Perplexity":
        """With one more chunk. GgufRunError if the model's numbers have broken down."""
        number = self.n_chunk + 1
        check_finite(nll, f"chunk {number}")
        return Perplexity(number, self.n_scored + len(nll), self.total + nll.sum(), self.total2 + (nll * nll).sum())


def perplexity(
    scorer: Scorer, chunks: Sequence[Chunk], see: Callable[[Block], None] = lambda block: None
) -> Iterator[Perplexity]:
    """Yield the perplexity over all chunks so far, after each. see: is shown each block of scores."""
    done = Perplexity()
    for chunk in chunks:
        parts = []
        for block in scorer.run(chunk.ids, chunk.targets):
            see(block)
            parts.append(block.nll)
        done = done.plus(np.concatenate(parts))
        yield done
