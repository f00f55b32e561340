"""Metadata pairs for a GGUF file: the types of Python values, and their bytes. metadata.py shows the layout."""

import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any

import numpy as np

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.mapped import BadText, quoted
from gguf_run.formats.gguf.metadata import MAX_DEPTH, MAX_KEY_BYTES, VALUE_TYPES, Typed, ValueType
from gguf_run.formats.gguf.strings import StringArray

# Lists and tuples are arrays. NumPy scalars and arrays have the type of their dtype.
MetaValue = Typed | str | bytes | bool | int | float | np.generic | np.ndarray[Any, Any] | Sequence[Any]

_BY_PYTHON_TYPE = ((StringArray, "array[string]"), (str, "string"), (bytes, "string"), (bool, "bool"), (float, "f32"))
_BY_DTYPE: Mapping[Any, str] = MappingProxyType({np.dtype(t.code): t.name for t in VALUE_TYPES.values() if t.code})


def encode_pair(key: str, value: MetaValue, order: str) -> bytes:
    """Return key, type and value for a file of byte order "<" or ">". GgufRunError if the value does not fit its type.

    A value that is not Typed becomes a string, a bool, an f32, or for integers the first of u32, i32, u64, i64 that
    holds the value or all items of the array.
    """
    what = f"metadata key {quoted(key)}"
    data = _text(key, what)
    if not 0 < len(data) <= MAX_KEY_BYTES:
        raise GgufRunError(f"{what} has {len(data)} bytes: 1 to {MAX_KEY_BYTES} are allowed")
    typed = as_typed(value, what)
    kind, _ = _split(typed.type, what)
    return _string(data, order) + struct.pack(order + "I", kind.id) + _encode(typed, order, what)


def as_typed(value: MetaValue, what: str = "the value") -> Typed:
    """Return the value with its type by the rules of encode_pair. GgufRunError if it has none."""
    if isinstance(value, Typed):
        return value
    if isinstance(value, np.generic | np.ndarray) and value.dtype.newbyteorder("=") in _BY_DTYPE:
        return Typed("array[" * value.ndim + _BY_DTYPE[value.dtype.newbyteorder("=")] + "]" * value.ndim, value)
    for python_type, name in _BY_PYTHON_TYPE:
        if isinstance(value, python_type):
            return Typed(name, value)
    if isinstance(value, int):
        return Typed(_integer_type([value], what), value)
    if isinstance(value, Sequence | np.ndarray):
        return Typed(f"array[{_item_type(value, what)}]", value)
    raise GgufRunError(f"{what} has a {type(value).__name__}: allowed are text, numbers, bool and arrays of these")


def _item_type(items: Any, what: str) -> str:
    kinds = {as_typed(item, what).type for item in items}
    if len(kinds) == 1:
        return kinds.pop()
    if kinds and all(kind.startswith("array") for kind in kinds):
        return "array"
    if kinds and kinds <= {"u32", "i32", "u64", "i64"}:
        return _integer_type(items, what)
    raise GgufRunError(f"{what}: an array of {len(items)} items of {len(kinds)} types needs a type, as in array[f32]")


def _integer_type(values: Sequence[int], what: str) -> str:
    for name in ("u32", "i32", "u64", "i64"):
        limits = np.iinfo(VALUE_TYPES[name].code)
        if limits.min <= min(values) and max(values) <= limits.max:
            return name
    raise GgufRunError(f"{what}: integers from {min(values)} to {max(values)} fit into no type of 64 bits")


def _split(name: str, what: str) -> tuple[ValueType, str]:
    """Split "array[...]" into "array" and the type of its items; another type into itself and "". One level only."""
    kind, bracket, items = name.partition("[")
    known = kind in VALUE_TYPES and (items.endswith("]") and kind == "array" if bracket else kind != "array")
    if not known or name.count("[") >= MAX_DEPTH:
        raise GgufRunError(f'{what}: unknown type "{name}": known are {" ".join(VALUE_TYPES)}, arrays as array[u32]')
    return VALUE_TYPES[kind], items[:-1]


def _encode(typed: Typed, order: str, what: str) -> bytes:
    """Return the bytes that follow the number of the value's type."""
    kind, items = _split(typed.type, what)
    value = typed.value
    if not items:
        return _plain([value], kind, order, what)
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str | bytes):
        raise GgufRunError(f"{what}: a value of type {typed.type} is an array, not {value!r}")
    head = struct.pack(order + "Q", len(value))
    if not items.startswith("array"):
        item = _split(items, what)[0]
        data = value.stored(order) if isinstance(value, StringArray) else _plain(value, item, order, what)
        return struct.pack(order + "I", item.id) + head + data
    arrays = [as_typed(item, what) if items == "array" else Typed(items, item) for item in value]
    for array in arrays:
        if not array.type.startswith("array["):
            raise GgufRunError(f"{what}: {array.value!r} does not fit type {items}")
    return struct.pack(order + "I", VALUE_TYPES["array"].id) + head + b"".join(_encode(a, order, what) for a in arrays)


def _plain(values: Any, kind: ValueType, order: str, what: str) -> bytes:
    """Return the bytes of strings or numbers, one after the other."""
    if not kind.code:
        return b"".join(_string(_text(value, what), order) for value in values)
    numbers = values.tolist() if isinstance(values, np.ndarray) else list(values)
    with suppress(struct.error, OverflowError):
        if kind.code != "?" or all(isinstance(number, bool | np.bool_) for number in numbers):
            return struct.pack(f"{order}{len(numbers)}{kind.code}", *numbers)
    shown = ", ".join(map(repr, numbers[:4])) + (", ..." if len(numbers) > 4 else "")
    raise GgufRunError(f"{what}: {shown} does not fit type {kind.name}")


def _text(value: object, what: str) -> bytes:
    """Return a string as bytes. Values of type bytes need not be UTF-8."""
    if isinstance(value, bytes | BadText):
        return value.stored if isinstance(value, BadText) else value
    if isinstance(value, str):
        with suppress(UnicodeEncodeError):
            return value.encode()
    raise GgufRunError(f"{what}: {value!r} is not a string of UTF-8")


def _string(data: bytes, order: str) -> bytes:
    return struct.pack(order + "Q", len(data)) + data
