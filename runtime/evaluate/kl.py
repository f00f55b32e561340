"""How far a model's predictions are from a base's: Kullback-Leibler divergence and its kin, defined as in llama.cpp's
perplexity tool. p is the base's distribution over the next token, q the model's; each scored token gives one value.

    kl         sum p log(p / q), in nats
    change     q(right token) - p(right token)
    agreement  how often both find the same token most likely
    ratio      perplexity(model) / perplexity(base); its uncertainty is that of the mean of log q - log p, so what both
               find hard does not count
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gguf_run.runtime.evaluate.logits_file import round_logits, unround_logits
from gguf_run.runtime.evaluate.text import Block, Chunk, Scorer, check_finite

PERCENTILES = (90.0, 95.0, 99.0, 99.9)


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error."""

    value: float
    error: float

    @classmethod
    def of_mean(cls, values: NDArray[np.float64]) -> "Estimate":
        n = len(values)
        return cls(float(values.mean()), float(values.std() / math.sqrt(n - 1)) if n > 1 else math.nan)

    def map(self, function: Callable[[float], float], slope: float) -> "Estimate":
        """The estimate of function(value); slope: the function's, there."""
        return Estimate(function(self.value), abs(slope) * self.error)


@dataclass
class Comparison:
    """One value for each scored token, chunk by chunk; same_top holds 0 and 1."""

    kl: list[NDArray[np.float64]] = field(default_factory=list)
    nll: list[NDArray[np.float64]] = field(default_factory=list)
    nll_base: list[NDArray[np.float64]] = field(default_factory=list)
    same_top: list[NDArray[np.float64]] = field(default_factory=list)

    @property
    def n_chunk(self) -> int:
        return len(self.same_top)

    def _all(self, parts: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        return np.concatenate(parts[: self.n_chunk])  # an interrupt may have come between two lists

    def perplexity(self) -> Estimate:
        return _exp(Estimate.of_mean(self._all(self.nll)))

    def perplexity_base(self) -> Estimate:
        return _exp(Estimate.of_mean(self._all(self.nll_base)))

    def ratio(self) -> Estimate:
        return _exp(Estimate.of_mean(self._all(self.nll) - self._all(self.nll_base)))

    def mean_kl(self) -> Estimate:
        return Estimate.of_mean(self._all(self.kl))

    def agreement(self) -> Estimate:
        return Estimate.of_mean(self._all(self.same_top))

    def _change(self) -> NDArray[np.float64]:
        return np.exp(-self._all(self.nll)) - np.exp(-self._all(self.nll_base))

    def mean_change(self) -> Estimate:
        return Estimate.of_mean(self._change())

    def rms_change(self) -> Estimate:
        square = Estimate.of_mean(self._change() ** 2)
        if square.value == 0:
            return square
        return square.map(math.sqrt, 0.5 / math.sqrt(square.value))

    def kl_percentiles(self) -> dict[float, float]:
        """The median, PERCENTILES and the largest value (100), interpolated."""
        percents = (50.0, *PERCENTILES, 100.0)
        return dict(zip(percents, np.percentile(self._all(self.kl), percents).tolist(), strict=True))

    def n_scored(self) -> int:
        return len(self._all(self.kl))


def _exp(estimate: Estimate) -> Estimate:
    return estimate.map(math.exp, math.exp(estimate.value))


def compare(
    scorer: Scorer, base: Callable[[int], Iterator[Block]], chunks: Sequence[Chunk], rounded: bool = False
) -> Iterator[Comparison]:
    """Yield the comparison, over all chunks so far, after each (one object that grows).

    base: yields what the base gave for chunk i: another model, which runs beside this one, or a file of logits.
    rounded: base's logits are rounded as round_logits does.
    """
    done = Comparison()
    for i, chunk in enumerate(chunks):
        kl, nll, nll_base, same_top = [], [], [], []
        for p, q in _pairs(base(i), scorer.run(chunk.ids, chunk.targets)):
            logits = unround_logits(*round_logits(q.logits)) if rounded else q.logits
            kl.append(scorer.reduce.divergence(p.logits, logits))
            nll.append(q.nll)
            nll_base.append(p.nll)
            same_top.append((p.top == q.top).astype(np.float64))
        parts = [np.concatenate(values) for values in (kl, nll, nll_base, same_top)]
        check_finite(np.stack(parts), f"chunk {i + 1}")
        for values, part in zip((done.kl, done.nll, done.nll_base, done.same_top), parts, strict=True):
            values.append(part)
        yield done


def _pairs(a: Iterator[Block], b: Iterator[Block]) -> Iterator[tuple[Block, Block]]:
    """Yield blocks of a and b for the same tokens: two devices may make blocks of different sizes."""
    left, right = next(a, None), next(b, None)
    while left is not None and right is not None:
        n = min(len(left.nll), len(right.nll))
        yield left.rows(0, n), right.rows(0, n)
        left = left.rows(n) if n < len(left.nll) else next(a, None)
        right = right.rows(n) if n < len(right.nll) else next(b, None)
    assert left is right, "both score the same tokens"
