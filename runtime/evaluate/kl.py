"""How far a model's predictions are from those of a base: Kullback-Leibler divergence and related figures.

The definitions are those of llama.cpp's perplexity tool. p is the base's distribution over the next token, q the
model's. Each scored token gives one value of each figure:

    kl         sum p log(p / q), in nats
    change     q(right token) - p(right token)
    agreement  1 if both find the same token most likely, else 0
    ratio      perplexity(model) / perplexity(base); its standard error comes from the mean of log q - log p, so that
               tokens that are hard for both do not widen it
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguf_run.runtime.evaluate.logits_file import round_logits, unround_logits
from gguf_run.runtime.evaluate.text import Block, Chunk, Scorer, check_finite

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9, 100.0)
TOKEN_SCORES = np.dtype(
    [
        ("kl", "f8"),  # nats
        ("nll", "f8"),  # -log q(right token)
        ("nll_base", "f8"),  # -log p(right token)
        ("same_top", "f8"),  # agreement, 0 or 1
    ]
)


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error."""

    value: float
    error: float  # nan for the mean of a single value

    @classmethod
    def of_mean(cls, values: NDArray[np.float64]) -> "Estimate":
        n = len(values)
        return cls(float(values.mean()), float(values.std() / math.sqrt(n - 1)) if n > 1 else math.nan)

    def map(self, function: Callable[[float], float], slope: float) -> "Estimate":
        """The estimate of function(value). slope: the derivative of function at value."""
        return Estimate(function(self.value), abs(slope) * self.error)

    def exp(self) -> "Estimate":
        return self.map(math.exp, math.exp(self.value))


@dataclass(frozen=True)
class Comparison:
    """The figures over some chunks of a text."""

    chunks: tuple[NDArray[np.void], ...] = ()  # of each chunk, TOKEN_SCORES[n_scored]

    @property
    def n_chunk(self) -> int:
        return len(self.chunks)

    def scores(self, name: str) -> NDArray[np.float64]:
        """One field of TOKEN_SCORES of all tokens, f64[n_scored]."""
        return np.concatenate([chunk[name] for chunk in self.chunks])

    def estimates(self) -> dict[str, Estimate]:
        """Return the figures by the names that gguf-eval --json gives them."""
        kl, nll, nll_base, same_top = (self.scores(name) for name in ("kl", "nll", "nll_base", "same_top"))
        change = np.exp(-nll) - np.exp(-nll_base)
        square = Estimate.of_mean(change**2)
        return {
            "perplexity": Estimate.of_mean(nll).exp(),
            "perplexity_base": Estimate.of_mean(nll_base).exp(),
            "perplexity_ratio": Estimate.of_mean(nll - nll_base).exp(),
            "p_change_mean": Estimate.of_mean(change),
            "p_change_rms": square.map(math.sqrt, 0.5 / math.sqrt(square.value)) if square.value else square,
            "same_top": Estimate.of_mean(same_top),
            "kl_mean": Estimate.of_mean(kl),
        }

    def by_chunk(self) -> "Comparison":
        """Return a comparison whose tokens are the means of chunks, which all have one size.

        Neighbours in a text resemble each other, so that the standard errors of tokens are too small to compare files
        by. The changes of probabilities have no meaning here.
        """
        means = np.empty(self.n_chunk, TOKEN_SCORES)
        for name in means.dtype.names or ():
            means[name] = [chunk[name].mean() for chunk in self.chunks]
        return Comparison((means,))

    def kl_percentiles(self) -> dict[float, float]:
        """Each of PERCENTILES (50: the median, 100: the largest value) and the divergence there, interpolated."""
        return dict(zip(PERCENTILES, np.percentile(self.scores("kl"), PERCENTILES).tolist(), strict=True))


def kl_ratio(a: Comparison, b: Comparison) -> Estimate:
    """Return the mean divergence of a as a part of that of b, which has scored the same tokens; nan if b's is 0.

    The standard error is of the pairs of chunks, by the delta method: what is hard for both does not widen it.
    """
    ours, theirs = (done.by_chunk().scores("kl") for done in (a, b))
    scale = float(theirs.mean()) or math.nan
    ratio = float(ours.mean()) / scale
    return Estimate(ratio, Estimate.of_mean(ours - ratio * theirs).error / scale)


def compare(
    scorer: Scorer, base: Callable[[int], Iterator[Block]], chunks: Sequence[Chunk], rounded: bool = False
) -> Iterator[Comparison]:
    """Yield the comparison over all chunks so far, after each chunk.

    base: yields the base's blocks of chunk i; the base is a second model or a file of logits. rounded: the base's
    logits went through round_logits, so the model's do too. GgufRunError if logits are not finite.
    """
    done = Comparison()
    for i, chunk in enumerate(chunks):
        parts = []
        for p, q in _pairs(base(i), scorer.run(chunk.ids, chunk.targets)):
            logits = unround_logits(*round_logits(q.logits)) if rounded else q.logits
            part = np.empty(len(q.nll), TOKEN_SCORES)
            part["kl"] = scorer.reduce.divergence(p.logits, logits)
            part["nll"], part["nll_base"], part["same_top"] = q.nll, p.nll, p.top == q.top
            parts.append(part)
        scores = np.concatenate(parts)
        check_finite(scores.view(np.float64), f"chunk {i + 1}")
        done = Comparison((*done.chunks, scores))
        yield done


def _pairs(a: Iterator[Block], b: Iterator[Block]) -> Iterator[tuple[Block, Block]]:
    """Yield blocks of a and b that are of the same tokens. Two devices may make blocks of different sizes."""
    left, right = next(a, None), next(b, None)
    while left is not None and right is not None:
        n = min(len(left.nll), len(right.nll))
        yield left.rows(0, n), right.rows(0, n)
        left = left.rows(n) if n < len(left.nll) else next(a, None)
        right = right.rows(n) if n < len(right.nll) else next(b, None)
    assert left is right, "both score the same tokens"
