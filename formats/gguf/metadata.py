"""The key-value section of a GGUF file. Values are checked when the file is opened and decoded when they are read.

part      layout
pair      key (string), value type (uint32), value
string    length in bytes (uint64), UTF-8
array     type of the items (uint32), number of items (uint64), items

Reference: ggml's description of GGUF.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.frozen import frozen
from gguf_run.formats.gguf.mapped import Cursor, MappedFile, quoted
from gguf_run.formats.gguf.strings import StringArray, skip_strings

# Limits on what a header may claim: those of ggml where it has one. All are far above any real model.
MAX_KEYS = 1 << 16
MAX_KEY_BYTES = (1 << 16) - 1
MAX_STRING_BYTES = 1 << 30
MAX_ITEMS = 1 << 30
MAX_DEPTH = 8
MAX_NESTED = 1 << 16  # arrays inside arrays, in one value


@frozen
class ValueType:
    """A type of metadata value."""

    id: int
    name: str
    code: str  # the letter of the type in the struct module and in NumPy; "": values have no fixed size

    @property
    def size(self) -> int:
        """Bytes of one value of a fixed-size type."""
        return np.dtype(self.code).itemsize


_VALUE_TYPES = tuple(
    ValueType(id, name, code)
    for id, (name, code) in enumerate((
        ("u8", "B"), ("i8", "b"), ("u16", "H"), ("i16", "h"), ("u32", "I"), ("i32", "i"), ("f32", "f"), ("bool", "?"),
        ("string", ""), ("array", ""), ("u64", "Q"), ("i64", "q"), ("f64", "d"),
    ))
)  # fmt: skip
_STRING, _ARRAY = _VALUE_TYPES[8], _VALUE_TYPES[9]
VALUE_TYPES: Mapping[str, ValueType] = MappingProxyType({type.name: type for type in _VALUE_TYPES})


@frozen
class Typed:
    """A metadata value with its type."""

    type: str  # as stored: "u32", "string", "array[f32]", "array[array]" ...
    value: Any


class Metadata(Mapping[str, Any]):
    """The metadata of one file, in file order.

    stored               Python value
    string               str; U+FFFD stands for bytes that are not UTF-8, and a warning says so
    number, bool         int, float, bool
    array of numbers     read-only NumPy array in native byte order
    array of strings     StringArray
    array of arrays      list of these
    """

    def __init__(self, entries: Mapping[str, tuple[str, Callable[[], Any]]]) -> None:
        """entries: for every key the name of the type, and a function that decodes the value."""
        self._entries = entries
        self._decoded: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._decoded:
            self._decoded[key] = self._entries[key][1]()
        return self._decoded[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def type_name(self, key: str) -> str:
        """Return the type of a value as it is stored: "u32", "string", "array[f32]" ..."""
        return self._entries[key][0]

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
    entries: dict[str, tuple[str, Callable[[], Any]]] = {}
    for i in range(n_kv):
        start = cursor.at
        key = cursor.string(f"metadata key {i} of {n_kv}", MAX_KEY_BYTES)
        if key in entries:
            raise cursor.error(f"the metadata key {quoted(key)} occurs twice", start)
        entries[key] = _read(cursor, _value_type(cursor, quoted(key)), f"the value of {quoted(key)}", _Nesting())
    return Metadata(entries)


def _value_type(cursor: Cursor, what: str) -> ValueType:
    at = cursor.at
    id = cursor.number("I", f"the type of {what}")
    if id >= len(_VALUE_TYPES):
        raise cursor.error(f"{what} has the unknown value type {id}: 0 to {len(_VALUE_TYPES) - 1} are known", at)
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


def _read(cursor: Cursor, type: ValueType, what: str, nesting: _Nesting) -> tuple[str, Callable[[], Any]]:
    """Move the cursor over a value. Return the name of its type, and a function that decodes it.

    FormatError if the value does not lie inside the file.
    """
    file, at = cursor.file, cursor.at
    if type.code:
        number = cursor.number(type.code, what)
        return type.name, lambda: number
    if type is _STRING:
        begin, end = cursor.span(what, MAX_STRING_BYTES)
        return type.name, lambda: cursor.text(begin, end, what)
    items, n = _array_header(cursor, what)
    name = f"array[{items.name}]"
    if items.code:
        first = cursor.skip(n * items.size, what)
        return name, lambda: _numbers(file, first, items, n)
    if items is _STRING:
        first = cursor.at
        skip_strings(cursor, n, what)
        return name, lambda: StringArray(Cursor(file, first), n, what)
    nesting.depth += 1
    nesting.count += n
    if nesting.depth >= MAX_DEPTH:
        raise cursor.error(f"{what} nests arrays more than {MAX_DEPTH} deep", at)
    if nesting.count > MAX_NESTED:
        raise cursor.error(f"{what} holds more than {MAX_NESTED} arrays", at)
    arrays = [_read(cursor, _ARRAY, what, nesting)[1] for _ in range(n)]
    nesting.depth -= 1
    return name, lambda: [decode() for decode in arrays]


def _numbers(file: MappedFile, at: int, items: ValueType, n: int) -> NDArray[Any]:
    data = file.bytes_at(at, n * items.size)
    # A bool is true for any byte but 0. Numbers of the other byte order are swapped.
    stored = np.dtype(file.order + items.code)
    values = data != 0 if items.code == "?" else data.view(stored).astype(stored.newbyteorder("="), copy=False)
    values.flags.writeable = False
    return values
