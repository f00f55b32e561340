"""Tiny tokenizers in metadata, and literal, slow versions of how text becomes tokens."""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import numpy as np

from gguf_run.runtime.tokenizers.merge import BYTE_CHARACTERS

CHARACTER = {byte: character for character, byte in BYTE_CHARACTERS.items()}

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def spelled(text: str) -> str:
    """Return a text as byte-level BPE spells it."""
    return "".join(CHARACTER[byte] for byte in text.encode())


def bpe_metadata(
    merges: Iterable[str] = (), special: dict[str, int] | None = None, pre: str = "gpt-2", **more: Any
) -> dict[str, Any]:
    """256 bytes, what the merges make, and special tokens with their types; more keys without their prefix."""
    merges = list(merges)
    special = special or {}
    tokens = list(dict.fromkeys([*CHARACTER.values(), *(pair.replace(" ", "") for pair in merges)]))
    types = [NORMAL] * len(tokens) + list(special.values())
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*tokens, *special],
        "token_type": types,
        "merges": merges or ["a b"],
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | more).items()}


def spm_metadata(scores: dict[str, float], special: dict[str, int] | None = None, **more: Any) -> dict[str, Any]:
    """<unk>, <s>, </s>, 256 bytes, tokens with scores, and special tokens with their types; more keys."""
    head = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL} | {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    types = head | dict.fromkeys(scores, NORMAL) | (special or {})
    keys = {
        "model": "llama",
        "tokens": list(types),
        "token_type": np.array(list(types.values()), np.int32),
        "scores": np.array([scores.get(token, 0.0) for token in types], np.float32),
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | more).items()}


def slow_merge(symbols: list[str], rank: Callable[[str, str], float | None]) -> list[str]:
    """Join the pair of the smallest rank, the leftmost of equals, until none is left."""
    symbols = list(symbols)
    while True:
        ranks = [(rank(a, b), i) for i, (a, b) in enumerate(pairwise(symbols))]
        possible = [(r, i) for r, i in ranks if r is not None]
        if not possible:
            return symbols
        _, i = min(possible)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def slow_split(text: str, special: list[tuple[str, int]]) -> list[str | int]:
    """Cut special tokens out: the longest first, each from the left."""
    pieces: list[str | int] = [text]
    for token, id in sorted(special, key=lambda pair: -len(pair[0].encode())):
        i = 0
        while i < len(pieces):
            piece = pieces[i]
            at = piece.find(token) if isinstance(piece, str) else -1
            if isinstance(piece, str) and at >= 0:
                pieces[i : i + 1] = [piece[:at], id, piece[at + len(token) :]]
            i += 1
    return [piece for piece in pieces if piece != ""]
