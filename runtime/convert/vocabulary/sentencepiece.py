"""SentencePiece's tokenizer.model: a protobuf message of which a dozen fields matter, read without the library.

A message is a row of fields. A field begins with a varint: its number << 3 | its wire type. Then follows

wire type   value
0           a varint
1           8 bytes
2           a varint n, n bytes
5           4 bytes

Field numbers: sentencepiece_model.proto of SentencePiece.
"""

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.runtime.convert.vocabulary.vocabulary import PADDING_SCORE, Added, Vocabulary, lay_out, read_file
from gguf_run.runtime.tokenizers.vocab import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

# SentencePiece.Type in ggml's token types.
_TYPES = {1: NORMAL, 2: UNKNOWN, 3: CONTROL, 4: USER_DEFINED, 5: UNUSED, 6: BYTE}

_UNIGRAM, _BPE = 1, 2


def read_sentencepiece(path: Path, n_vocab: int | None, added: Iterable[Added] = ()) -> Vocabulary:
    """Return the vocabulary of a SentencePiece model.

    n_vocab: tokens are added or cut to make so many; None: as many as there are.
    added: tokens of other files; those with ids beyond the file's own are added.

    FormatError for a damaged file. UnsupportedError for a model of words or characters.
    """
    pieces: list[tuple[str, float, int]] = []
    train: dict[int, Any] = {}
    norm: dict[int, Any] = {}
    for number, value in _fields(read_file(path), path):
        if number == 1:
            pieces.append(_piece(value, path, len(pieces)))
        elif number == 2:
            train = dict(_fields(value, path))
        elif number == 3:
            norm = dict(_fields(value, path))
    if not pieces:
        raise FormatError(f"{path}: there are no tokens in it; is it a SentencePiece model?")
    kind = train.get(3, _UNIGRAM)
    if kind not in (_UNIGRAM, _BPE):
        raise UnsupportedError(f"{path}: a SentencePiece model of type {kind!r}: 1 (unigram) and 2 (BPE) are supported")
    found = {entry.id: entry.content for entry in added} | {id: token for id, (token, _, _) in enumerate(pieces)}
    n_vocab = n_vocab or max(found) + 1
    tokens, types = lay_out(found, n_vocab, path)
    types[: len(pieces)] = [type for _, _, type in pieces[:n_vocab]]
    scores = [score for _, score, _ in pieces[:n_vocab]] + [PADDING_SCORE] * (n_vocab - len(pieces))
    vocabulary = Vocabulary("llama" if kind == _BPE else "t5", "default", tokens, types, scores)
    vocabulary.adds = ("bos",) if kind == _BPE else ("eos",)
    vocabulary.more["add_space_prefix"] = norm.get(3, 1) != 0
    charsmap = norm.get(2)
    if isinstance(charsmap, bytes) and charsmap:
        vocabulary.more["precompiled_charsmap"] = np.frombuffer(charsmap, np.uint8)
    if kind == _UNIGRAM or norm.get(4, 1) != 0:
        vocabulary.more["remove_extra_whitespaces"] = norm.get(4, 1) != 0
    if norm.get(5, 1) == 0:
        vocabulary.more["escape_whitespaces"] = False
    if train.get(24, 0) != 0:
        vocabulary.more["treat_whitespace_as_suffix"] = True
    for role, field, default in (("unk", 40, 0), ("bos", 41, 1), ("eos", 42, 2), ("pad", 43, -1)):
        id = train.get(field, default)
        if isinstance(id, int) and 0 <= id < len(pieces):
            vocabulary.roles[role] = id
    return vocabulary


def is_sentencepiece(data: bytes) -> bool:
    """Tell whether a file begins like a SentencePiece model, with field 1 of bytes. Tiktoken files are text."""
    return data[:1] == b"\x0a"


def _piece(message: Any, path: Path, id: int) -> tuple[str, float, int]:
    fields: dict[int, Any] = {1: b"", 2: 0.0, 3: 1} | dict(_fields(message, path))
    text, score, kind = (fields[number] for number in (1, 2, 3))
    if not isinstance(score, float) or score != score or kind not in _TYPES:
        raise FormatError(f"{path}: token {id} has the score {score!r} and the type {kind!r}")
    try:
        return bytes.decode(text), score, _TYPES[kind]
    except (UnicodeDecodeError, TypeError):
        raise FormatError(f"{path}: token {id} is no UTF-8") from None


def _fields(data: Any, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each field of a message: an int, bytes, or a float for four bytes."""
    if not isinstance(data, bytes):
        raise FormatError(f"{path}: no SentencePiece model: a number stands where a message must")
    at = 0
    while at < len(data):
        tag, at = _varint(data, at, path)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at, path)
            yield number, value - (1 << 64) if value >> 63 else value
            continue
        n = {1: 8, 5: 4}.get(wire, -1)
        if wire == 2:
            n, at = _varint(data, at, path)
        if n < 0 or n > len(data) - at:
            raise FormatError(f"{path}: no SentencePiece model: field {number} does not fit into {len(data)} bytes")
        part, at = data[at : at + n], at + n
        yield number, struct.unpack("<f", part)[0] if wire == 5 else part


def _varint(data: bytes, at: int, path: Path) -> tuple[int, int]:
    """Return the number that begins at byte `at`, and where the next field begins."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, at + i + 1
    raise FormatError(f"{path}: no SentencePiece model: a number is cut off or longer than 64 bits")
