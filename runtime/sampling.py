"""Choosing the next token: repeat penalty, top_k, top_p, min_p, temperature, then a draw, as llama.cpp orders them.

Each filter sees what the one before it left, and top_p and min_p see probabilities before the temperature is applied.
The vocabulary has up to 262,144 tokens and this runs once per token, so nothing here sorts more than it must.
"""

import math
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import GgufRunError, OptionError

# Option: (lowest, highest, whole numbers only, what is allowed in words).
_LIMITS: dict[str, tuple[float, float, bool, str]] = {
    "temperature": (0, math.inf, False, "0 (always the most likely token) or more"),
    "top_k": (0, math.inf, True, "a whole number, 0 (off) or more"),
    "top_p": (0, 1, False, "0 to 1 (off)"),
    "min_p": (0, 1, False, "0 (off) to 1"),
    "repeat_penalty": (1e-3, math.inf, False, "at least 0.001; 1 is off"),
    "repeat_last_n": (0, math.inf, True, "a whole number, 0 (off) or more"),
    "seed": (0, 2**64 - 1, True, "a whole number from 0 to 2^64 - 1"),
}


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. The defaults are llama.cpp's. OptionError where a value is not allowed.

    temperature: divides the logits; 0 is greedy. top_k: keep the k most likely. top_p: keep the smallest set that
    holds this probability. min_p: keep what is at least this fraction as likely as the best. repeat_penalty: divides
    positive and multiplies negative logits of the last `repeat_last_n` tokens. seed: None draws one.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (lowest, highest, whole, allowed) in _LIMITS.items():
            value: Any = getattr(self, name)
            if name == "seed" and value is None:
                continue
            kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
            is_number = isinstance(value, kinds) and not isinstance(value, bool)
            if not is_number or not lowest <= value <= highest or math.isinf(value):
                raise OptionError(f"{name} is {value!r}; allowed: {allowed}")


class Sampler:
    """Draws tokens from logits. `seed` is the seed in use, so that a result can be repeated."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.seed = random.getrandbits(32) if params.seed is None else int(params.seed)
        self._random = random.Random(self.seed)
        self._recent: deque[int] = deque(maxlen=params.repeat_last_n)

    def accept(self, ids: Iterable[int]) -> None:
        """Tokens that now stand in the context (prompt or answer): the repeat penalty looks at the last of them."""
        self._recent.extend(ids)

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Choose from f32[n_vocab] (not changed). GgufRunError if the logits are not numbers."""
        params = self.params
        if params.repeat_penalty != 1 and self._recent:
            logits = _penalized(logits, np.unique(np.fromiter(self._recent, np.intp)), params.repeat_penalty)
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):
            raise GgufRunError(
                f"the model's output for the next token is {logits[best]}, not a number: the file is damaged, or its "
                "values are too large for this computation"
            )
        if params.temperature == 0:
            return best
        ids, kept = _filtered(logits, params)
        if params.min_p > 0:
            likely = kept >= logits[best] + math.log(params.min_p)
            ids, kept = ids[likely], kept[likely]
        with np.errstate(over="ignore"):  # a tiny temperature: far below the best becomes -inf, which is right
            cumulative = np.exp((kept.astype(np.float64) - logits[best]) / params.temperature).cumsum()
        chosen = cumulative.searchsorted(self._random.random() * cumulative[-1], side="right")
        return int(ids[chosen])


def _penalized(logits: NDArray[np.float32], ids: NDArray[np.intp], penalty: float) -> NDArray[np.float32]:
    logits = logits.copy()
    chosen = logits[ids]
    logits[ids] = np.where(chosen > 0, chosen / np.float32(penalty), chosen * np.float32(penalty))
    return logits


def _filtered(logits: NDArray[np.float32], params: SamplingParams) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Apply top_k and top_p; return ids and their logits, most likely first if either is on."""
    if params.top_p == 1:
        return _largest(logits, params.top_k) if params.top_k else (np.arange(len(logits)), logits)
    # top_p alone: its set is nearly always small, so look at a growing head instead of sorting the vocabulary.
    sizes = [params.top_k] if params.top_k else [64, 1024, len(logits)]
    total = 0.0 if params.top_k else np.exp(logits - logits.max()).sum(dtype=np.float64)
    for size in sizes:
        ids, kept = _largest(logits, size)
        mass = np.exp(kept.astype(np.float64) - kept[0]).cumsum()
        wanted = params.top_p * (total or mass[-1])
        if mass[-1] >= wanted:
            break
    n_keep = int(mass.searchsorted(wanted)) + 1
    return ids[:n_keep], kept[:n_keep]


def _largest(logits: NDArray[np.float32], k: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Return ids and logits of the k largest, largest first, the lower id first among equals.

    At least k values are no smaller than the k-th largest of the maxima of >= k disjoint groups, so only values from
    that bound up are sorted. Groups are the columns of a matrix: their maxima are one vectorized pass.
    """
    k = min(k, len(logits))
    n_group = max(2 * k, len(logits) // 64)
    n_row = len(logits) // n_group
    if n_row > 1:
        maxima = logits[: n_row * n_group].reshape(n_row, n_group).max(axis=0)
        bound = np.partition(maxima, n_group - k)[n_group - k]
    else:
        bound = np.partition(logits, len(logits) - k)[len(logits) - k]
    ids = np.flatnonzero(logits >= bound)
    order = np.argsort(-logits[ids], kind="stable")[:k]
    ids = ids[order]
    return ids, logits[ids]
