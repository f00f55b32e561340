"""What is done to a text before it becomes tokens: replacements of characters, and cuts that GGUF has no name for.

`tokenizer.ggml.normalizer.json` and `tokenizer.ggml.pre_tokenizer.json` are keys of gguf-convert: a list of steps, as
tokenizer.json writes them. The tokenizers package carries them out. Other programs do not read these keys.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer as Package
from tokenizers.normalizers import NFC, NFKC
from tokenizers.pre_tokenizers import Sequence as Steps

from gguf_run.formats.errors import FormatError
from gguf_run.runtime.tokenizers.vocab import read_bool, read_string

T = TypeVar("T")

NORMALIZERS = frozenset(
    ("BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Prepend", "Replace", "Strip",
     "StripAccents")
)  # fmt: skip
PRE_TOKENIZERS = frozenset(
    ("BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "Metaspace", "Punctuation", "Split",
     "UnicodeScripts", "Whitespace", "WhitespaceSplit")
)  # fmt: skip

# Limits against files that are made to do harm.
MAX_JSON_CHARS = 1 << 15
_MAX_GROWTH = 20  # characters that one may become; NFKD makes 18 of U+FDFA


def read_normalizer(
    metadata: Mapping[str, Any], usual: Sequence[Any] = (), joins_spaces: bool = False
) -> Callable[[str], str] | None:
    """Return a function that replaces characters of a text, or None if there is nothing to do.

    usual: normalizers of the tokenizers package that do the work where the metadata has no steps.
    joins_spaces: several spaces become one, and those around the text go.
    """
    steps = read_steps(metadata, "normalizer", NORMALIZERS)
    composes = steps is None and not usual
    if steps is None:
        forms = (("nfc", NFC), ("nfkc", NFKC))
        steps = [*usual, *(make() for name, make in forms if read_bool(metadata, f"normalizer.{name}", False))]
    if (charsmap := _charsmap(metadata)) is not None:
        steps, composes = [*steps, charsmap], False
    if not steps and not joins_spaces:
        return None

    def normalize(text: str) -> str:
        if composes and text.isascii() and not joins_spaces:
            return text
        most = _MAX_GROWTH * len(text) + 100
        for step in steps:
            text = _guarded(step.normalize_str, text)
            if len(text) > most:
                raise FormatError(f"tokenizer.ggml.normalizer makes {len(text)} characters of a text: damaged")
        return " ".join(word for word in text.split(" ") if word) if joins_spaces else text

    return normalize


def read_cutter(metadata: Mapping[str, Any]) -> Callable[[str], list[str]] | None:
    """Return a function that cuts a text into words, or None if the metadata has no steps for that."""
    steps = read_steps(metadata, "pre_tokenizer", PRE_TOKENIZERS)
    return None if steps is None else words_by(Steps(steps))


def words_by(cutter: Any) -> Callable[[str], list[str]]:
    """Return a function that gives the words of a text, by a pre-tokenizer of the tokenizers package."""
    return lambda text: [word for word, _ in _guarded(cutter.pre_tokenize_str, text)]


def read_steps(metadata: Mapping[str, Any], kind: str, allowed: frozenset[str]) -> list[Any] | None:
    """Return the objects of the tokenizers package for `tokenizer.ggml.<kind>.json`, None if it is missing."""
    text = read_string(metadata, f"{kind}.json")
    if text is None:
        return None
    key = f"tokenizer.ggml.{kind}.json"
    if len(text) > MAX_JSON_CHARS:
        raise FormatError(f"{key} has {len(text)} characters: at most {MAX_JSON_CHARS} are allowed")
    try:
        steps = json.loads(text)
    except (ValueError, RecursionError):
        steps = None
    if not isinstance(steps, list) or not all(isinstance(s, dict) and str(s.get("type")) in allowed for s in steps):
        raise FormatError(f"{key} must be a list of steps of the types {', '.join(sorted(allowed))}")
    return [build_step(step, kind, key) for step in steps]


def build_step(step: Any, kind: str, where: str) -> Any:
    """Build a step of a tokenizer.json. kind: "normalizer" or "pre_tokenizer". FormatError names `where`."""
    empty = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}
    try:
        return getattr(_guarded(Package.from_str, json.dumps(empty | {kind: step})), kind)
    except FormatError:
        raise FormatError(f"{where}: {kind} {str(step)[:60]} is not understood") from None
    except Exception as error:  # the package raises Exception itself
        raise FormatError(f"{where}: {kind} {str(step)[:60]} is not understood ({error})") from None


def _guarded(call: Callable[[str], T], text: str) -> T:
    """Call a function of the tokenizers package. It panics where an expression takes too long."""
    try:
        return call(text)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the package raises it and does not export its class
            raise
        raise FormatError(f"a step of the tokenizer fails for a text of {len(text)} characters ({error})") from None


def _charsmap(metadata: Mapping[str, Any]) -> "_Charsmap | None":
    """Return SentencePiece's table of replacements."""
    key = "tokenizer.ggml.precompiled_charsmap"
    value = metadata.get(key)
    if value is None:
        return None
    data = np.asarray(value) if isinstance(value, np.ndarray) else np.empty(0)  # lists hold texts or lists
    if data.ndim != 1 or data.dtype.kind not in "iu" or data.dtype.itemsize != 1:
        raise FormatError(f"{key} must be an array of bytes")
    return _Charsmap(_checked(data.tobytes(), key))


class _Charsmap:
    """Replaces the longest text of the table that begins at a character, as SentencePiece does.

    The tokenizers package looks at whole graphemes, and loses a part of some: the line feed of "\r\n".
    """

    def __init__(self, data: bytes) -> None:
        """data: a checked table, see _checked."""
        size = int.from_bytes(data[:4], "little")
        self._units: list[int] = np.frombuffer(data, "<u4", size // 4, 4).tolist()
        self._texts = data[4 + size :]

    def normalize_str(self, text: str) -> str:
        data = text.encode()
        out = bytearray()
        at = 0
        while at < len(data):
            end, place = self._longest(data, at)
            if place < 0:  # no text of the table begins here: the character stays
                end = at + 1
                while end < len(data) and data[end] & 0xC0 == 0x80:
                    end += 1
                out += data[at:end]
            else:
                out += self._texts[place : self._texts.index(0, place)]
            at = end
        return out.decode(errors="replace")

    def _longest(self, data: bytes, at: int) -> tuple[int, int]:
        """Return where the longest text of the table ends that begins at `at`, and the place of its replacement."""
        units, node, end, place = self._units, 0, at, -1
        unit = units[0]
        for i in range(at, len(data)):
            node ^= (unit >> 10) << ((unit & 512) >> 6) ^ data[i]
            unit = units[node] if node < len(units) else 1 << 31
            if unit & (1 << 31 | 0xFF) != data[i]:
                break
            if unit & 256:
                end, place = i + 1, units[node ^ (unit >> 10) << ((unit & 512) >> 6)] & 0x7FFFFFFF
        return end, place


def _checked(data: bytes, key: str) -> bytes:
    """Check a table of replacements and return it: a u32 size, a trie of u32 units, then texts that end with NUL.

    Every unit must lead to another one inside of the trie.

        bit 31 = 1    the unit holds the place of a text (bits 0-30)
        bit 31 = 0    10-30 base | 9 base is multiplied by 256 | 8 a text ends here | 0-7 byte
    """
    size = int.from_bytes(data[:4], "little")
    if len(data) < 8 or size % 4 or not 0 < size < len(data) - 4 or data[-1]:
        raise FormatError(f"{key} is damaged: it says {size} bytes of table, and has {len(data)}")
    units = np.frombuffer(data, "<u4", size // 4, 4)
    is_inner = units >> 31 == 0
    is_inner[0] = True  # each search begins there and reads a base, whatever bit 31 says
    inner = np.flatnonzero(is_inner)
    base = (units[inner] >> 10).astype(np.int64) << ((units[inner] & 512) >> 6)
    if ((inner ^ base) | 255).max(initial=0) >= len(units):
        raise FormatError(f"{key} is damaged: a unit leads out of the table of {len(units)}")
    ends = (inner ^ base)[(units[inner] & 256) != 0]
    places = units[ends] & 0x7FFFFFFF
    texts = np.frombuffer(data, np.uint8, offset=4 + size)
    if places.max(initial=0) >= len(texts) or (texts[places] & 0xC0 == 0x80).any():
        raise FormatError(f"{key} is damaged: a replacement does not begin in the texts, or inside of a character")
    return data
