"""A vocabulary as a GGUF file has it, and what all readers of tokenizer files share."""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from gguf_run.formats.errors import FormatError
from gguf_run.formats.gguf.mapped import read_bytes
from gguf_run.runtime.tokenizers.spm import SPACE as SPACE
from gguf_run.runtime.tokenizers.vocab import CONTROL, NORMAL, UNUSED, USER_DEFINED

T = TypeVar("T", str, bytes)

# Limits. The largest published vocabularies have some 260,000 tokens in 35 MB.
MAX_FILE_BYTES = 1 << 29
MAX_TOKENS = 1 << 22
MAX_TOKEN_CHARS = 1024  # of a token whose parts are looked for; published ones have at most some 512

PADDING_SCORE = -10000.0
ADDED_SCORE = -1000.0

# Added tokens that are control tokens although checkpoints mark them as ordinary ones (as in llama.cpp's converter).
_CONTROL_NAMES = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_CONTROL_BRACKETS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
# Gemma 4's markers that a reader of the answer looks for: no control tokens although checkpoints mark them as such.
_SHOWN_NAMES = (
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'
)  # fmt: skip


class ConversionWarning(UserWarning):
    """A GGUF file cannot say all that the checkpoint does. The text says what is lost, and how to check."""


@dataclass
class Vocabulary:
    """The tokens of a model and what belongs to them. Keys are those of GGUF, without "tokenizer.ggml."."""

    model: str
    pre: str
    tokens: list[str]  # by id
    types: list[int]  # by id, ggml's numbers
    scores: list[float] | None = None  # by id, of some models
    merges: list[str] | None = None  # "left right" each, of some models
    more: dict[str, Any] = field(default_factory=dict)  # other keys
    roles: dict[str, int | str] = field(default_factory=dict)  # role ("bos" ...) -> id or token, as far as a file tells
    adds: tuple[str, ...] = ()  # roles whose tokens are put around a text, if tokenizer_config.json does not say


@dataclass(frozen=True)
class Added:
    """An added token of tokenizer.json or tokenizer_config.json."""

    id: int
    content: str
    special: bool  # no text is turned into it
    lstrip: bool = False  # takes the white space on its left
    rstrip: bool = False  # takes the white space on its right
    single_word: bool = False  # is found only where no letter or digit stands beside it


def warn(path: Path, text: str) -> None:
    """Give a ConversionWarning about a file."""
    warnings.warn(f"{path}: {text}", ConversionWarning, stacklevel=3)


def read_file(path: Path) -> bytes:
    """Return a file's bytes. GgufRunError if it cannot be read, is no file or is far larger than any tokenizer."""
    try:
        return read_bytes(path, MAX_FILE_BYTES)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from None


def text_of(value: Any, key: str) -> str | None:
    """Return the text under a key of an object of JSON, or None."""
    text = value.get(key) if isinstance(value, Mapping) else None
    return text if isinstance(text, str) else None


def added_tokens(entries: Any, path: Path) -> list[Added]:
    """Return a checked list of {"id", "content", "special"} entries. None is an empty list."""
    if entries is not None and not isinstance(entries, list):
        raise FormatError(f"{path}: added_tokens is {type(entries).__name__}: a list is allowed")
    found = []
    for entry in entries or ():
        id, content = entry.get("id") if isinstance(entry, Mapping) else None, text_of(entry, "content")
        if type(id) is not int or not 0 <= id < MAX_TOKENS or content is None:
            raise FormatError(f"{path}: an added token is {str(entry)[:80]}: it needs an id and its text as content")
        flags = ("special", "lstrip", "rstrip", "single_word")
        found.append(Added(id, content, *(entry.get(flag) is True for flag in flags)))
    return found


def tokens_by_id(vocab: Mapping[str, Any], added: Iterable[Added], path: Path) -> dict[int, str]:
    """Return the tokens of a vocabulary {token: id} and added ones, by id. FormatError for a wrong or repeated id."""
    found: dict[int, str] = {}
    for token, id in vocab.items():
        if type(id) is not int or not 0 <= id < MAX_TOKENS:
            allowed = f"0 to {MAX_TOKENS - 1} are allowed"
            raise FormatError(f"{path}: token {token[:40]!r} has the id {str(id)[:40]}: {allowed}")
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
    """Return tokens and types of the ids 0 to n_vocab - 1. An id without a token becomes [PADn], of type unused.

    ConversionWarning if tokens have larger ids. They are left out, because the model has no rows for them.
    """
    tokens = [found.get(id, f"[PAD{id}]") for id in range(n_vocab)]
    types = [NORMAL if id in found else UNUSED for id in range(n_vocab)]
    if left_out := [token for id, token in found.items() if id >= n_vocab]:
        why = f"config.json says vocab_size {n_vocab}, so the model has no embedding for them"
        warn(path, f"{len(left_out)} tokens such as {left_out[0][:40]!r} are left out: {why}")
    if len(set(tokens)) < n_vocab:
        twice, _ = Counter(tokens).most_common(1)[0]
        raise FormatError(f"{path}: token {twice[:40]!r} stands there twice")
    return tokens, types


def pairs_of(token: T, ranks: Mapping[T, int]) -> list[tuple[T, T]]:
    """Return all pairs of tokens that make a token, the lowest ranks first. ranks: by token.

    FormatError for a token of more than MAX_TOKEN_CHARS, which would take very long.
    """
    if len(token) > MAX_TOKEN_CHARS:
        raise FormatError(f"token {token[:40]!r} has {len(token)} characters: at most {MAX_TOKEN_CHARS} are allowed")
    pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
    known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
    return sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def mark_added(vocabulary: Vocabulary, added: Iterable[Added]) -> None:
    """Give added tokens their types, scores and texts. The text of a token that is no control token has real spaces.

    Tokens with flags are listed under lstrip_token_ids, rstrip_token_ids and single_word_token_ids.
    """
    for entry in added:
        if entry.id >= len(vocabulary.tokens):
            continue
        brackets = any(entry.content.startswith(a) and entry.content.endswith(z) for a, z in _CONTROL_BRACKETS)
        control = entry.special or brackets or entry.content in _CONTROL_NAMES
        control = control and not (vocabulary.model == "gemma4" and entry.content in _SHOWN_NAMES)
        vocabulary.types[entry.id] = CONTROL if control else USER_DEFINED
        vocabulary.tokens[entry.id] = entry.content if control else entry.content.replace(SPACE, " ")
        if vocabulary.scores is not None:
            vocabulary.scores[entry.id] = ADDED_SCORE
        for flag in ("lstrip", "rstrip", "single_word"):
            if getattr(entry, flag):
                key = f"{flag}_token_ids"
                vocabulary.more[key] = sorted({*vocabulary.more.get(key, ()), entry.id})
