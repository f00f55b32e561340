"""The tokens that may still be chosen, and the largest logits among them."""

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Breakers = Mapping[int, tuple[tuple[int, ...], ...]]  # see history.breakers
EXACT = 4096  # up to this many candidates are computed in float64, more in float32


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
