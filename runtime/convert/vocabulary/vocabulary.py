"""A checkpoint's vocabulary in the shape that a GGUF file holds, before the ids of roles and templates join it."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf_run.formats.errors import FormatError
from gguf_run.runtime.tokenizers.vocab import CONTROL, NORMAL, UNUSED, USER_DEFINED

# Larger ones are not read: the largest published vocabularies have some 260,000 tokens in 35 MB.
MAX_FILE_BYTES = 1 << 29
MAX_TOKENS = 1 << 22

SPACE = "▁"  # how SentencePiece spells a space
PADDING_SCORE = -10000.0
ADDED_SCORE = -1000.0

# Added tokens that checkpoints mark as ordinary, and that no text should turn into (as llama.cpp's converter has it).
_CONTROL_NAMES = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_CONTROL_BRACKETS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))


class ConversionWarning(UserWarning):
    """Something of a checkpoint cannot be carried over exactly; says what, and how to check."""


@dataclass
class Vocabulary:
    """model: `tokenizer.ggml.model`; pre: `tokenizer.ggml.pre`; tokens, types and scores by id (scores of some models
    only); merges: "left right" each; more: other keys `tokenizer.ggml.*` without their prefix; roles: names or ids of
    tokens with a role, as far as the file tells."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    more: dict[str, Any] = field(default_factory=dict)
    roles: dict[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Added:
    """A token added to the vocabulary of a model, as tokenizer.json and tokenizer_config.json list them."""

    id: int
    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False


def read_file(path: Path) -> bytes:
    """Return a file's bytes; FormatError if it cannot be read or is far larger than any tokenizer."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise FormatError(f"{path}: {size} bytes are no tokenizer; at most {MAX_FILE_BYTES} are read")
        return path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from None


def added_tokens(entries: Any, path: Path) -> list[Added]:
    """Check a list of {"id", "content", "special"}; None is an empty one."""
    if entries is not None and not isinstance(entries, list):
        raise FormatError(f"{path}: added_tokens is {type(entries).__name__}: a list is allowed")
    found = []
    for entry in entries or ():
        id, content = (entry.get("id"), entry.get("content")) if isinstance(entry, Mapping) else (None, None)
        if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < MAX_TOKENS or not isinstance(content, str):
            raise FormatError(f"{path}: an added token is {str(entry)[:80]}: it needs an id and its text as content")
        found.append(Added(id, content, *(entry.get(flag) is True for flag in ("special", "lstrip", "rstrip"))))
    return found


def tokens_by_id(vocab: Mapping[str, Any], added: Iterable[Added], path: Path) -> dict[int, str]:
    """Join a vocabulary {token: id} and added tokens. FormatError: ids that are no ids, or one id or text twice."""
    found: dict[int, str] = {}
    for token, id in vocab.items():
        if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < MAX_TOKENS:
            raise FormatError(
                f"{path}: token {token[:40]!r} has the id {str(id)[:40]}: 0 to {MAX_TOKENS - 1} are allowed"
            )
        if found.setdefault(id, token) is not token:
            raise FormatError(f"{path}: the tokens {found[id][:40]!r} and {token[:40]!r} have the same id {id}")
    for entry in added:
        id = vocab.get(entry.content, entry.id)
        if id != entry.id or found.setdefault(id, entry.content) != entry.content:
            other = found[entry.id][:40] if entry.id in found else id
            raise FormatError(f"{path}: added token {entry.content[:40]!r} with id {entry.id} contradicts {other!r}")
    if not found:
        raise FormatError(f"{path}: the vocabulary is empty")
    return found


def lay_out(found: Mapping[int, str], n_vocab: int, path: Path) -> tuple[list[str], list[int]]:
    """Return tokens and types for the ids 0 to n_vocab - 1; ids without a token become [PADn], of type unused.

    ConversionWarning if tokens have ids from n_vocab on: the model has no rows for them, so they are left out.
    """
    tokens = [found.get(id, f"[PAD{id}]") for id in range(n_vocab)]
    types = [NORMAL if id in found else UNUSED for id in range(n_vocab)]
    _warn_if_left_out(found, n_vocab, path)
    if len(set(tokens)) < n_vocab:
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
        raise FormatError(f"{path}: token {twice[:40]!r} stands there twice")
    return tokens, types


def _warn_if_left_out(found: Mapping[int, str], n_vocab: int, path: Path) -> None:
    left_out = [token for id, token in found.items() if id >= n_vocab]
    if left_out:
        warnings.warn(
            f"{path}: {len(left_out)} tokens such as {left_out[0][:40]!r} are left out: config.json says vocab_size "
            f"{n_vocab}, so the model has no embedding for them",
            ConversionWarning,
            stacklevel=3,
        )


def mark_added(vocabulary: Vocabulary, added: Iterable[Added]) -> None:
    """Give added tokens their types (and scores), and their texts: a text that is to be found has real spaces.

    Those that take the white space beside them have lists, lstrip_token_ids and rstrip_token_ids.
    """
    for entry in added:
        if entry.id >= len(vocabulary.tokens):
            continue
        control = entry.special or looks_like_control(entry.content)
        vocabulary.types[entry.id] = CONTROL if control else USER_DEFINED
        vocabulary.tokens[entry.id] = entry.content if control else entry.content.replace(SPACE, " ")
        if vocabulary.scores is not None:
            vocabulary.scores[entry.id] = ADDED_SCORE
        for side in ("lstrip", "rstrip"):
            if getattr(entry, side):
                key = f"{side}_token_ids"
                vocabulary.more[key] = sorted({*vocabulary.more.get(key, ()), entry.id})


def looks_like_control(token: str) -> bool:
    """Whether a name is one that models use for control tokens."""
    return token in _CONTROL_NAMES or any(token.startswith(a) and token.endswith(z) for a, z in _CONTROL_BRACKETS)
