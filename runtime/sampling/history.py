"""Samplers that look back at the context: repeat, frequency and presence penalties, and DRY.

DRY ("don't repeat yourself") makes a token less likely if it would make a repetition longer: the longer the repetition,
the less likely. A repetition ends at a breaker, a text such as the end of a line.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from gguf_run.runtime.sampling.candidates import Breakers, Candidates, State
from gguf_run.runtime.sampling.params import SamplingParams
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

MAX_BREAKER_BYTES = 40
MAX_BREAKER_TOKENS = 20
MAX_LOG = 88.7228391  # the logarithm of the largest float32
HIGHEST = 1e37  # the largest logit that a penalty leaves


def penalties(candidates: Candidates, params: SamplingParams, state: State) -> Candidates:
    """Penalize recent tokens.

    repeat_penalty divides their positive logits and multiplies the negative ones. frequency_penalty is subtracted for
    each time that a token came, presence_penalty once.
    """
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


def dry(candidates: Candidates, params: SamplingParams, state: State) -> Candidates:
    """Subtract multiplier * base^(n - allowed_length) from tokens that would make a repetition of n tokens longer."""
    runs = repeated_runs(_last(state.recent, params.dry_penalty_last_n), params, state.breakers)
    runs = {id: n for id, n in runs.items() if () not in state.breakers.get(id, ())}
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


def repeated_runs(recent: Sequence[int], params: SamplingParams, breakers: Breakers) -> dict[int, int]:
    """Return the tokens that would make a repetition longer, and how many tokens the repetition has already.

    Repetitions of fewer than dry_allowed_length tokens do not count. Example: after a b c x a b c, the run "a b c"
    has come twice and went on with x the first time: {x: 3}.
    """
    if len(recent) <= params.dry_allowed_length:
        return {}
    back = list(recent)[::-1]
    limit = _since_breaker(back, breakers)
    runs: dict[int, int] = {}
    for id, length in zip(back, _matches(back)[1:], strict=False):
        n = min(length, limit)
        if n >= params.dry_allowed_length:
            runs[id] = max(n, runs.get(id, 0))
    return runs


def breakers(tokenizer: Tokenizer, texts: Iterable[str]) -> Breakers:
    """Return the tokens at which a breaker stands or begins, and for each the tokens that complete the breaker.

    texts: the breakers. () stands for a token that holds a whole breaker. Several breakers may begin in a token.
    """
    completions: dict[int, set[tuple[int, ...]]] = {}
    pieces = [tokenizer.piece(id) for id in range(tokenizer.n_vocab)]
    for text in texts:
        whole = text.encode()[:MAX_BREAKER_BYTES]
        # A piece may end with a start of the breaker. For each start: the tokens of the rest.
        rests = {}
        for n in range(1, len(whole)):
            tail = tokenizer.encode(whole[n:].decode(errors="ignore"), add_special=False, parse_special=False)
            rests[whole[:n]] = tuple(tail[:MAX_BREAKER_TOKENS])
        for id, piece in enumerate(pieces):
            found = {rest for start, rest in rests.items() if piece.endswith(start)}
            if whole in piece:
                found = {()}
            if found:
                completions.setdefault(id, set()).update(found)
    return {id: tuple(sorted(rests)) for id, rests in completions.items()}


def _last(recent: Iterable[int], n: int) -> list[int]:
    return list(recent)[-n:] if n else []


def _in_range(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Limit penalized logits: no penalty forbids a token, and none allows a token that was forbidden."""
    return np.where(old > -np.inf, np.clip(new, -HIGHEST, HIGHEST), old)


def _find(candidates: Candidates, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return where some of the ids stand among the candidates, and the places of these in `ids`."""
    wanted = np.array(ids, np.intp)
    if candidates.ids is None:
        which = np.flatnonzero(wanted < len(candidates.logits))
        return wanted[which], which
    _, at, which = np.intersect1d(candidates.ids, wanted, assume_unique=True, return_indices=True)
    return at, which


def _since_breaker(back: Sequence[int], breakers: Breakers) -> int:
    """Return how many tokens came since the last breaker. back: the context, the last token first."""
    for i, id in enumerate(back):
        lengths = [len(rest) for rest in breakers.get(id, ()) if tuple(back[i - len(rest) : i][::-1]) == rest]
        if lengths:
            return i - max(lengths)
    return len(back)


def _matches(ids: Sequence[int]) -> list[int]:
    """Return for each place how many tokens from there on equal those at the beginning.

    This is the Z function, computed in linear time (Gusfield, "Algorithms on strings, trees and sequences").
    """
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
