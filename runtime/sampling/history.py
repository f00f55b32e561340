"""Samplers that look back at the context: repeat, frequency and presence penalties, and DRY.

DRY ("don't repeat yourself") makes a token less likely the longer the run of tokens that it would repeat. A run ends at
a breaker: a text such as a line's end. `breakers` finds the tokens in which one stands or begins.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gguf_run.runtime.sampling.filters import Candidates, State

if TYPE_CHECKING:
    from gguf_run.runtime.sampling.params import SamplingParams
    from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

Breakers = dict[int, tuple[tuple[int, ...], ...]]

MAX_BREAKER_BYTES = 40
MAX_BREAKER_TOKENS = 20
MAX_LOG = 88.7228391  # of what a float32 can hold
HIGHEST = 1e37


def penalties(candidates: Candidates, params: "SamplingParams", state: State) -> Candidates:
    """Divide positive and multiply negative logits of recent tokens; subtract for each time that one came, and once."""
    counts = Counter(_last(state.recent, params.repeat_last_n))
    if not counts:
        return candidates
    at, which = _find(candidates, list(counts))
    times = np.fromiter(counts.values(), np.float32)[which]
    logits = candidates.logits.copy()
    old, penalty = logits[at], np.float32(params.repeat_penalty)
    penalized = np.where(old > 0, old / penalty, old * penalty)
    penalized -= times * np.float32(params.frequency_penalty) + np.float32(params.presence_penalty)
    logits[at] = _in_range(old, penalized)
    return candidates._replace(logits=logits, is_sorted=False)


def dry(candidates: Candidates, params: "SamplingParams", state: State) -> Candidates:
    """Subtract multiplier * base^(n - allowed_length) where a token would make a repetition of n tokens longer."""
    runs = {
        id: n
        for id, n in repeated_runs(_last(state.recent, params.dry_penalty_last_n), params, state.breakers).items()
        if () not in state.breakers.get(id, ())
    }
    if not runs:
        return candidates
    at, which = _find(candidates, list(runs))
    exponents = np.fromiter(runs.values(), np.float64)[which] - params.dry_allowed_length
    if params.dry_base > 1.000001:
        exponents = np.minimum(exponents, int(MAX_LOG / math.log(params.dry_base)))
    logits = candidates.logits.copy()
    penalty = np.clip(params.dry_multiplier * params.dry_base**exponents, -HIGHEST, HIGHEST)
    logits[at] = _in_range(logits[at], logits[at] - penalty)
    return candidates._replace(logits=logits, is_sorted=False)


def repeated_runs(
    recent: Sequence[int], params: "SamplingParams", breakers: Mapping[int, tuple[tuple[int, ...], ...]]
) -> dict[int, int]:
    """Tokens that would lengthen a repetition, and the most tokens that it already has, allowed_length or more.

    >>> a b c x a b c: the run "a b c" came before and went on with x, so {x: 3}
    """
    if len(recent) <= params.dry_allowed_length:
        return {}
    back = list(recent)[::-1]
    limit = _since_breaker(back, breakers)
    runs: dict[int, int] = {}
    if limit < params.dry_allowed_length:
        return runs
    for i, n in enumerate(_matches(back)[1:]):
        n = min(n, limit)
        if n >= params.dry_allowed_length:
            runs[back[i]] = max(n, runs.get(back[i], 0))
    return runs


def breakers(tokenizer: "Tokenizer", texts: Iterable[str]) -> Breakers:
    """For each token that holds a breaker or ends with its beginning: the tokens that complete it, () for none."""
    found: dict[int, set[tuple[int, ...]]] = {}
    pieces = [tokenizer.piece(id) for id in range(tokenizer.n_vocab)]
    for text in texts:
        whole = text.encode()[:MAX_BREAKER_BYTES]
        # Where a piece may end inside a breaker, and what is then still to come.
        rests = {}
        for n in range(1, len(whole)):
            tail = tokenizer.encode(whole[n:].decode(errors="ignore"), add_special=False, parse_special=False)
            rests[whole[:n]] = tuple(tail[:MAX_BREAKER_TOKENS])
        for id, piece in enumerate(pieces):
            if whole in piece:
                found.setdefault(id, set()).add(())
            else:
                for rest in (rest for start, rest in rests.items() if piece.endswith(start)):
                    found.setdefault(id, set()).add(rest)
    return {id: tuple(sorted(rests)) for id, rests in found.items()}


def _last(recent: Iterable[int], n: int) -> list[int]:
    return list(recent)[-n:] if n else []


def _in_range(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """A penalty, however large, neither forbids a token nor allows one that was forbidden."""
    return np.where(old > -np.inf, np.clip(new, -HIGHEST, HIGHEST), old)


def _find(candidates: Candidates, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Where ids stand among the candidates, and which of them those are."""
    wanted = np.array(ids, np.intp)
    if candidates.ids is None:
        which = np.flatnonzero(wanted < len(candidates.logits))
        return wanted[which], which
    _, at, which = np.intersect1d(candidates.ids, wanted, assume_unique=True, return_indices=True)
    return at, which


def _since_breaker(back: Sequence[int], breakers: Mapping[int, tuple[tuple[int, ...], ...]]) -> int:
    """How many tokens came since the last breaker. back: the last token first."""
    for i, id in enumerate(back):
        lengths = [len(rest) for rest in breakers.get(id, ()) if tuple(back[i - len(rest) : i][::-1]) == rest]
        if lengths:
            return i - max(lengths)
    return len(back)


def _matches(ids: Sequence[int]) -> list[int]:
    """How many tokens at each place are the same as at the beginning: the Z function, in linear time (Gusfield)."""
    n, left, right = len(ids), 0, 0
    z = [n] + [0] * (n - 1)
    for i in range(1, n):
        length = min(right - i, z[i - left]) if i < right else 0
        while i + length < n and ids[length] == ids[i + length]:
            length += 1
        z[i] = length
        if i + length > right:
            left, right = i, i + length
    return z
