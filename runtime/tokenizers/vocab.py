"""The vocabulary in a file's metadata, checked: tokens, their types, and the ids that have a role."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import FormatError
from gguf_run.formats.frozen import frozen
from gguf_run.runtime.tokenizers.special import ASCII_BLANKS, WHITE_SPACE, Flags

# Values of tokenizer.ggml.token_type; any other value means undefined.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_PREFIX = "tokenizer.ggml."

# Converters write -1, signed or unsigned, if a model has no such token.
_NO_ID = (-1, 0xFFFFFFFF)

# Tokens that end an answer whatever the metadata says. They are control tokens even if token_type does not say so.
END_NAMES = (
    "<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|end_of_text|>", "<|endoftext|>", "<EOT>", "_<EOT>",
    "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>", "<|eom_id|>", "<|return|>", "<|call|>", "<|flush|>",
    "<|calls|>", "[EOS]", "<eos>", "<turn|>", "<|tool_response>", "[e~[",
)  # fmt: skip

# This one ends an answer only if it is a control token: in Gemma's vocabulary it is a tag of HTML.
_END_IF_CONTROL = "</s>"

# The structure of an answer with several messages. These tokens are shown, although files call them control tokens. If
# a vocabulary has a token of each set in _ENDS_OF_MANY_MESSAGES, "<|end|>" ends a message and not the answer.
_SHOWN_NAMES = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
_END_OF_MESSAGE = "<|end|>"
_ENDS_OF_MANY_MESSAGES = (("<|call|>", "<|calls|>"), ("<|return|>", "<|flush|>"))


# Keys that few files have: what they need is imported only then.
STEPS = ("normalizer.nfc", "normalizer.nfkc", "normalizer.json", "pre_tokenizer.json", "precompiled_charsmap")


@frozen
class _Role:
    """The role of a token."""

    key: str  # the metadata has the id as `tokenizer.ggml.<key>_token_id`
    names: tuple[str, ...]  # texts of the token, if the metadata has no id
    ends_answer: bool = False


_ROLES = (
    _Role("eot", END_NAMES, True),
    _Role("eom", ("<|eom_id|>",), True),
    _Role("fim_pre", ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
                      "<|code_prefix|>", "<|prefix|>")),
    _Role("fim_suf", ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
                      "<|code_suffix|>", "<|suffix|>")),
    _Role("fim_mid", ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
                      "<|code_middle|>", "<|middle|>")),
    _Role("fim_pad", ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"), True),
    _Role("fim_rep", ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"), True),
    _Role("fim_sep", ("<|file_sep|>",), True),
)  # fmt: skip
_FIM = ("fim_pre", "fim_suf", "fim_mid")


@frozen
class Defaults:
    """Values for keys that the metadata lacks. They depend on the kind of tokenizer."""

    add_bos: bool = False
    add_eos: bool = False
    bos: int | None = None
    eos: int | None = None
    unknown: int | None = None


@frozen
class Vocab:
    """A checked vocabulary. Ids of roles are None if the model has no such token."""

    tokens: list[str]  # texts, by id
    ids: dict[str, int]  # the reverse
    types: bytes  # NORMAL, CONTROL ..., one byte for each token
    bos: int | None  # begins a text
    before: tuple[int, ...]  # what is put before a text: BOS, and in few models further tokens
    eos: int | None  # ends a text
    eot: int | None  # ends a turn of a conversation
    unknown: int | None  # stands for text that the vocabulary cannot express
    stop_ids: frozenset[int]  # all tokens that end an answer
    never_ids: tuple[int, ...]  # tokens that an answer must not have
    fim: tuple[int, ...]  # stand before the start of a text with a gap, before its end, and before the gap's text
    add_bos: bool  # the model wants BOS before a text
    add_eos: bool  # the model wants EOS after a text

    def of_type(self, *types: int) -> list[int]:
        """Return the ids of all tokens of the given types, in order."""
        return np.flatnonzero(np.isin(np.frombuffer(self.types, np.uint8), types)).tolist()

    def needed_unknown(self) -> int:
        """Return `unknown`. FormatError if there is none."""
        if self.unknown is None:
            raise FormatError("tokenizer.ggml.unknown_token_id is missing: this kind of tokenizer needs it")
        return self.unknown


def read_vocab(metadata: Mapping[str, Any], defaults: Defaults) -> Vocab:
    """Read and check the vocabulary. FormatError names the key, what it holds and what it must hold."""
    tokens, ids = _tokens(metadata)
    types = _types(metadata, len(tokens))
    roles = _roles(metadata, ids, types)
    eos = _id(metadata, "eos", len(tokens), defaults.eos)
    ends = {eos, *(roles.get(role.key) for role in _ROLES if role.ends_answer)}
    stop_ids = _stop_ids({id for id in ends if id is not None}, ids, types)
    stop_ids.update(_ids(metadata, "eos_token_ids", len(tokens)))
    bos = _id(metadata, "bos", len(tokens), defaults.bos)
    return Vocab(
        tokens=tokens,
        ids=ids,
        types=bytes(types),
        bos=bos,
        before=_ids(metadata, "bos_token_ids", len(tokens)) or (() if bos is None else (bos,)),
        eos=eos,
        eot=roles.get("eot"),
        unknown=_id(metadata, "unknown", len(tokens), defaults.unknown),
        stop_ids=frozenset(stop_ids),
        never_ids=_ids(metadata, "suppress_tokens", len(tokens)),
        fim=tuple(roles[key] for key in _FIM) if roles.keys() >= {*_FIM} else (),
        add_bos=read_bool(metadata, "add_bos_token", defaults.add_bos),
        add_eos=read_bool(metadata, "add_eos_token", defaults.add_eos),
    )


def _tokens(metadata: Mapping[str, Any]) -> tuple[list[str], dict[str, int]]:
    """Return the tokens' texts by id, and the ids by text. FormatError if two tokens are the same text."""
    tokens = read_strings(metadata, "tokens")
    ids = {token: id for id, token in enumerate(tokens)}  # three times as fast as dict(zip())
    if "" in ids:
        tokens = [token or f"[EMPTY_{id}]" for id, token in enumerate(tokens)]
        ids = {token: id for id, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for id, token in enumerate(tokens) if ids[token] != id)
        raise FormatError(
            f"{_PREFIX}tokens: tokens {tokens.index(twice)} and {ids[twice]} are the same text {twice[:40]!r}"
        )
    return tokens, ids


def _roles(metadata: Mapping[str, Any], ids: Mapping[str, int], types: bytearray) -> dict[str, int]:
    """Return the ids of the roles. A token that is found by its text becomes a control token in `types`."""
    roles: dict[str, int] = {}
    for role in _ROLES:
        id = _id(metadata, role.key, len(types))
        if id is None and (named := [ids[name] for name in role.names if name in ids]):
            id = named[0]
            types[id] = CONTROL
        if id is not None:
            roles[role.key] = id
    return roles


def _stop_ids(ends: set[int], ids: Mapping[str, int], types: bytearray) -> set[int]:
    """Return the tokens `ends`, and those that end an answer by their text. Changes `types` of tokens known by text."""
    by_text = {ids[name] for name in END_NAMES if name in ids}
    for id in by_text:
        types[id] = CONTROL
    stop_ids = ends | by_text
    if _END_IF_CONTROL in ids and types[ids[_END_IF_CONTROL]] == CONTROL:
        stop_ids.add(ids[_END_IF_CONTROL])
    shown = [ids[name] for name in _SHOWN_NAMES if name in ids]
    if _END_OF_MESSAGE in ids and all(any(name in ids for name in names) for names in _ENDS_OF_MANY_MESSAGES):
        stop_ids.discard(ids[_END_OF_MESSAGE])
        shown.append(ids[_END_OF_MESSAGE])
    for id in shown:
        types[id] = USER_DEFINED
    return stop_ids


def read_flags(metadata: Mapping[str, Any], vocab: Vocab) -> Flags:
    """Return what special tokens do to the text beside them.

    gguf-convert writes lists of them, for what the tokenizers package does. Without a list, Phi-3's tokens take ASCII
    blanks on their right, as in llama.cpp. FormatError if a list holds anything but ids.
    """
    n = len(vocab.tokens)
    left, right, single_word = (
        frozenset(_ids(metadata, f"{flag}_token_ids", n)) for flag in ("lstrip", "rstrip", "single_word")
    )
    name = str(metadata.get("general.name", "")).lower()
    if not right and ("phi-3" in name or "phi3" in name):
        usual = ("<unk>", "<s>", "<|endoftext|>")
        right = frozenset(id for id in vocab.of_type(CONTROL, UNKNOWN, USER_DEFINED) if vocab.tokens[id] not in usual)
        return Flags(left, right, single_word, ASCII_BLANKS)
    return Flags(left, right, single_word, WHITE_SPACE)


def _ids(metadata: Mapping[str, Any], name: str, n: int) -> tuple[int, ...]:
    """Return the list of ids `tokenizer.ggml.<name>`, empty if missing; FormatError if it holds anything but ids."""
    ids = metadata.get(_PREFIX + name, ())
    ids = ids.tolist() if isinstance(ids, np.ndarray) else ids
    if not isinstance(ids, Sequence) or not all(isinstance(id, int) and 0 <= id < n for id in ids):
        raise FormatError(f"{_PREFIX}{name} must be a list of ids from 0 to {n - 1}")
    return tuple(ids)


def read_strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    """Return the array of strings `tokenizer.ggml.<name>`; FormatError unless it is one and is not empty."""
    key = _PREFIX + name
    value = metadata.get(key)
    if value is None:
        raise FormatError(f"{key} is missing: the file holds no complete tokenizer, convert the model again")
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise FormatError(f"{key} is no array of strings, but {_describe(value)}")
    strings = list(value)
    if not strings:
        raise FormatError(f"{key} is empty")
    try:
        "".join(strings).encode()
    except (TypeError, UnicodeEncodeError):
        # The faulty string is looked for only now: joining all is faster than looking at each.
        for i, string in enumerate(strings):
            if not isinstance(string, str):
                raise FormatError(f"{key}: entry {i} is no string, but {_describe(string)}") from None
        raise FormatError(f"{key} holds characters that UTF-8 cannot express") from None
    return strings


def read_numbers(metadata: Mapping[str, Any], name: str, n: int) -> NDArray[Any] | None:
    """Return the numeric array `tokenizer.ggml.<name>`, None if missing; FormatError unless it has n numbers."""
    key = _PREFIX + name
    value = metadata.get(key)
    if value is None:
        return None
    try:
        numbers = np.asarray(value)
    except (ValueError, OverflowError):
        numbers = np.empty(0, object)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iuf":
        raise FormatError(f"{key} is no array of numbers, but {_describe(value)}")
    if len(numbers) != n:
        raise FormatError(f"{key} has {len(numbers)} entries for {n} tokens")
    return numbers


def read_string(metadata: Mapping[str, Any], name: str) -> str | None:
    """Return the string `tokenizer.ggml.<name>`, None if missing."""
    value: str | None = _of_type(metadata, name, (str,), "a string")
    return value


def read_bool(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    """Return the truth value `tokenizer.ggml.<name>`."""
    value = _of_type(metadata, name, (bool, np.bool_), "true or false")
    return default if value is None else bool(value)


def _of_type(metadata: Mapping[str, Any], name: str, types: tuple[type, ...], what: str) -> Any:
    """Return the value `tokenizer.ggml.<name>`, None if missing; FormatError unless it has one of the types."""
    value = metadata.get(_PREFIX + name)
    if value is not None and type(value) not in types:
        raise FormatError(f"{_PREFIX}{name} must be {what}, but is {_describe(value)}")
    return value


def _types(metadata: Mapping[str, Any], n: int) -> bytearray:
    types = read_numbers(metadata, "token_type", n)
    if types is None:
        return bytearray([NORMAL]) * n
    if types.dtype.kind == "f":
        raise FormatError(f"{_PREFIX}token_type holds {types.dtype} numbers: integers are allowed")
    return bytearray(np.where((types >= NORMAL) & (types <= BYTE), types, 0).astype(np.uint8).tobytes())


def _id(metadata: Mapping[str, Any], role: str, n: int, default: int | None = None) -> int | None:
    value: int | None = _of_type(metadata, f"{role}_token_id", (int,), "a token's id")
    if value is None:
        return default if default is not None and default < n else None
    if value in _NO_ID:
        return None
    if not 0 <= value < n:
        raise FormatError(f"{_PREFIX}{role}_token_id is {value}: the vocabulary has the ids 0 to {n - 1}")
    return value


def _describe(value: object) -> str:
    """Describe a wrong value for an error: its type, and the value, cut if it is long."""
    text = repr(value) if isinstance(value, int | float | str) else ""
    return f"{type(value).__name__} {text}".strip() if len(text) <= 40 else f"{type(value).__name__} {text[:40]}..."
