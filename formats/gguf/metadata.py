"""The key-value section of a GGUF file. Values are checked when the file is opened and decoded when they are read.

part      layout
pair      key (string), value type (uint32), value
string    length in bytes (uint64), UTF-8
array     type of the items (uint32), number of items (uint64), items

Reference: ggml's description of GGUF.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from gguf_run.formats.gguf.mapped import Cursor, MappedFile, quoted
from gguf_run.formats.gguf.strings import StringArray, skip_strings

# Limits on what a header may claim: those of ggml where it has one. All are far above any real model.
MAX_KEYS = 1 << 16
MAX_KEY_BYTES = (1 << 16) - 1
MAX_STRING_BYTES = 1 << 30
MAX_ITEMS = 1 << 30
MAX_DEPTH = 8
MAX_NESTED = 1 << 16  # arrays inside arrays, in one value


@dataclass(frozen=True)
class ValueType:
    """A type of metadata value."""

    id: int
    name: str
    code: str  # the letter of the type in the struct module and in NumPy; "": values have no fixed size

    @property
    def size(self) -> int:
        """Bytes of one value of a fixed-size type."""
        return np.dtype(self.code).itemsize


_VALUE_TYPES = MappingProxyType(
    {
        id: ValueType(id, name, code)
        for id, name, code in (
            (0, "u8", "B"), (1, "i8", "b"), (2, "u16", "H"), (3, "i16", "h"), (4, "u32", "I"), (5, "i32", "i"),
            (6, "f32", "f"), (7, "bool", "?"), (8, "string", ""), (9, "array", ""), (10, "u64", "Q"), (11, "i64", "q"),
            (12, "f64", "d"),
        )
    }
)  # fmt: skip
_STRING, _ARRAY = _VALUE_TYPES[8], _VALUE_TYPES[9]
VALUE_TYPES = MappingProxyType({type.name: type for type in _VALUE_TYPES.values()})


@dataclass(frozen=True)
class Typed:
    """A metadata value with its type."""

    type: str  # as stored: "u32", "string", "array[f32]", "array[array]" ...
    value: Any


class Metadata(Mapping[str, Any]):
    """The metadata of one file, in file order.

    stored               Python value
    string               str; FormatError if the bytes are not UTF-8
    number, bool         int, float, bool
    array of numbers     read-only NumPy array in native byte order
    array of strings     StringArray
    array of arrays      list of these
    """

    def __init__(self, file: MappedFile, entries: Mapping[str, tuple[ValueType, int]]) -> None:
        """entries: for every key the type and the offset of the value."""
        self._file = file
        self._entries = entries
        self._decoded: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._decoded:
            type, at = self._entries[key]
            self._decoded[key] = _decode(Cursor(self._file, at), type, f"the value of {quoted(key)}")
        return self._decoded[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def type_name(self, key: str) -> str:
        """Return the type of a value as it is stored: "u32", "string", "array[f32]" ..."""
        type, at = self._entries[key]
        if type is not _ARRAY:
            return type.name
        return f"array[{_array_header(Cursor(self._file, at), key)[0].name}]"

    def typed(self, key: str) -> Typed:
        """Return a value with its exact type, for a writer."""
        return Typed(self.type_name(key), _nested(self[key]) if isinstance(self[key], list) else self[key])


def _nested(arrays: list[Any]) -> list[Any]:
    """Return an array of arrays in which every inner array has its type, even an empty one."""
    return [Typed("array[array]", _nested(item)) if isinstance(item, list) else item for item in arrays]


def read_metadata(cursor: Cursor, n_kv: int) -> Metadata:
    """Read n_kv pairs and leave the cursor behind them. FormatError for a bad pair or a key that occurs twice."""
    if n_kv > MAX_KEYS:
        raise cursor.error(f"the header claims {n_kv} metadata keys: at most {MAX_KEYS} are allowed")
    entries: dict[str, tuple[ValueType, int]] = {}
    for i in range(n_kv):
        start = cursor.at
        key = cursor.string(f"metadata key {i} of {n_kv}", MAX_KEY_BYTES)
        if key in entries:
            raise cursor.error(f"the metadata key {quoted(key)} occurs twice", start)
        type = _value_type(cursor, quoted(key))
        entries[key] = type, cursor.at
        _skip(cursor, type, f"the value of {quoted(key)}", _Nesting())
    return Metadata(cursor.file, entries)


def _value_type(cursor: Cursor, what: str) -> ValueType:
    at = cursor.at
    id = cursor.number("I", f"the type of {what}")
    if id not in _VALUE_TYPES:
        raise cursor.error(f"{what} has the unknown value type {id}: 0 to {max(_VALUE_TYPES)} are known", at)
    return _VALUE_TYPES[id]


def _array_header(cursor: Cursor, what: str) -> tuple[ValueType, int]:
    """Return the type and the number of the items. FormatError if the file is too short for so many."""
    type = _value_type(cursor, f"an item of {what}")
    at = cursor.at
    n = cursor.number("Q", f"the number of items of {what}")
    if n > MAX_ITEMS:
        raise cursor.error(f"{what} has {n} items: at most {MAX_ITEMS} are allowed", at)
    smallest = 8 if type is _STRING else 12 if type is _ARRAY else type.size
    Cursor(cursor.file, cursor.at).skip(n * smallest, what)
    return type, n


@dataclass
class _Nesting:
    """The arrays of arrays in one value."""

    depth: int = 0  # arrays around the cursor
    count: int = 0  # inner arrays so far


def _skip(cursor: Cursor, type: ValueType, what: str, nesting: _Nesting) -> None:
    """Move the cursor over a value. FormatError if the value does not lie inside the file."""
    if type.code:
        cursor.skip(type.size, what)
    elif type is _STRING:
        at = cursor.at
        length = cursor.number("Q", f"the length of {what}")
        if length > MAX_STRING_BYTES:
            raise cursor.error(f"{what} has {length} bytes: at most {MAX_STRING_BYTES} are allowed", at)
        cursor.skip(length, what)
    else:
        at = cursor.at
        items, n = _array_header(cursor, what)
        if items.code:
            cursor.skip(n * items.size, what)
        elif items is _STRING:
            skip_strings(cursor, n, what)
        else:
            nesting.depth += 1
            nesting.count += n
            if nesting.depth >= MAX_DEPTH:
                raise cursor.error(f"{what} nests arrays more than {MAX_DEPTH} deep", at)
            if nesting.count > MAX_NESTED:
                raise cursor.error(f"{what} holds more than {MAX_NESTED} arrays", at)
            for _ in range(n):
                _skip(cursor, _ARRAY, what, nesting)
            nesting.depth -= 1


def _decode(cursor: Cursor, type: ValueType, what: str) -> Any:
    """Read a value that _skip has checked before."""
    if type.code:
        return cursor.number(type.code, what)
    if type is _STRING:
        return cursor.string(what, MAX_STRING_BYTES)
    items, n = _array_header(cursor, what)
    if items.code:
        data = cursor.file.bytes_at(cursor.skip(n * items.size, what), n * items.size)
        # A bool is true for any byte but 0. Numbers of the other byte order are swapped.
        stored = np.dtype(cursor.file.order + items.code)
        values = data != 0 if items.code == "?" else data.view(stored).astype(stored.newbyteorder("="), copy=False)
        values.flags.writeable = False
        return values
    if items is _STRING:
        return StringArray(cursor.file, cursor.at, n, what)
    return [_decode_next(cursor, what) for _ in range(n)]


def _decode_next(cursor: Cursor, what: str) -> Any:
    """Decode one array and move behind it. Decoding alone would not move the cursor over a lazy array."""
    at = cursor.at
    _skip(cursor, _ARRAY, what, _Nesting())
    return _decode(Cursor(cursor.file, at), _ARRAY, what)
