"""The tokens that may still be chosen, and the largest logits among them."""

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

    seed: int  # of the draws
    n_past: int  # tokens of the context: where the next one will stand
    recent: deque[int]  # the last of them, the last one at the end
    breakers: Breakers = field(default_factory=dict)


def uniform(seed: int, position: int, stream: int = 0) -> float:
    """Return a random number in [0, 1) that depends on nothing else, by Philox4x32-10 (Salmon et al. 2011).

    seed: the key. position, stream: the counter. All three are from 0 to 2^64 - 1.
    kernels_cpu/sampling/choose.py has the same function for compiled code.
    """
    mask = 0xFFFFFFFF
    a, b, c, d = position & mask, position >> 32, stream & mask, stream >> 32
    key, key2 = seed & mask, seed >> 32
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) ^ b ^ key, q & mask, (p >> 32) ^ d ^ key2, p & mask
        key, key2 = (key + 0x9E3779B9) & mask, (key2 + 0xBB67AE85) & mask
    return (a << 21 | b >> 11) / (1 << 53)


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
