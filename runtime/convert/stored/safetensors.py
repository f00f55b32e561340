"""Reading safetensors files: nothing in the header is believed before it is checked.

A file lies as: n (uint64, little-endian), a JSON object of n bytes, the tensors' data. The object has for each tensor
{"dtype": "BF16", "shape": [rows, columns], "data_offsets": [begin, end]}, offsets from the end of the header, and may
have texts under "__metadata__". https://github.com/huggingface/safetensors#format
"""

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.gguf.mapped import Cursor, MappedFile, quoted
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.runtime.convert.stored.sources import F32, source

MAX_HEADER_BYTES = 100 << 20  # the limit of the format's own library
_MAX_DIMS = 8

# Name in the file -> numpy's type of the values, or of the bits where numpy has no such type.
DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {name: np.dtype(code) for name, code in (
        ("F64", "<f8"), ("F32", "<f4"), ("F16", "<f2"), ("BF16", "<u2"), ("F8_E4M3", "u1"), ("F8_E5M2", "u1"),
        ("F8_E8M0", "u1"), ("I64", "<i8"), ("I32", "<i4"), ("I16", "<i2"), ("I8", "i1"), ("U64", "<u8"),
        ("U32", "<u4"), ("U16", "<u2"), ("U8", "u1"), ("BOOL", "u1"),
    )}
)  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor as a checkpoint holds it. shape: rows last, as in the checkpoint; data: its bytes, a view of the file.
    file: where it is; offset: in that file, or -1 if the bytes are no part of it as they are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8] = field(repr=False, compare=False)
    file: MappedFile = field(repr=False, compare=False)
    offset: int = -1

    def array(self) -> NDArray[Any]:
        """Return the values in the tensor's shape, read-only, as DTYPES says."""
        return self.data.view(DTYPES[self.dtype]).reshape(self.shape)

    def release(self, first: int, end: int) -> None:
        """Rows first .. end (all dimensions but the last are rows) are not needed soon."""
        row_bytes = self.data.nbytes // max(1, math.prod(self.shape[:-1]))
        if self.offset >= 0:
            self.file.release(self.offset + first * row_bytes, (end - first) * row_bytes)

    def floats(self) -> Tensor:
        """Return the tensor as BF16, F16 or F32 (of any other float). UnsupportedError if it holds no floats."""
        if not self.dtype.startswith(("F", "BF")) or self.dtype == "F8_E8M0":
            raise UnsupportedError(
                f"{self.file.path}: tensor {quoted(self.name)} has values of type {self.dtype}: weights are "
                "F32, F16, BF16, F64, F8_E4M3 or F8_E5M2"
            )
        if 0 in self.shape:
            raise FormatError(f"{self.file.path}: tensor {quoted(self.name)} of shape {self.shape} has no values")
        array = self.data.view(DTYPES[self.dtype]).reshape(-1, *self.shape[-1:])
        if self.dtype in ("F32", "F16", "BF16"):
            type = type_by_name(self.dtype)
            return source(self.name, self.shape, type, self.file, lambda a, b: array[a:b], self.release)
        table = float8(self.dtype) if array.dtype == np.uint8 else None

        def read(first: int, end: int) -> NDArray[Any]:
            part = array[first:end]
            return part.astype(np.float32) if table is None else table[part]

        return source(self.name, self.shape, F32, self.file, read, self.release)


def float8(dtype: str) -> NDArray[np.float32]:
    """Return the value of each of the 256 codes of F8_E4M3 (no infinities; 0x7f and 0xff are NaN) or F8_E5M2."""
    codes = np.arange(256, dtype=np.uint16)
    if dtype == "F8_E5M2":
        return (codes << 8).view(np.float16).astype(np.float32)  # the upper half of an F16
    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    size = np.where(exponent > 0, np.ldexp(8 + mantissa, exponent - 10), np.ldexp(mantissa, -9))
    size[codes & 127 == 127] = np.nan
    return np.where(codes & 128, -size, size).astype(np.float32)


def read_safetensors(path: Path) -> dict[str, Stored]:
    """Map a file and return its tensors, in the order of their names in the header. FormatError for anything wrong."""
    file = MappedFile(path)
    cursor = Cursor(file)
    n = cursor.number("Q", "the length of the header")
    if n > MAX_HEADER_BYTES:
        raise cursor.error(f"the header has {n} bytes, at most {MAX_HEADER_BYTES} are allowed: no safetensors file", 0)
    start = cursor.skip(n, "the header") + n
    header = _object(file, bytes(file.map[8:start]))
    header.pop("__metadata__", None)
    tensors = {name: _tensor(file, name, entry, start) for name, entry in header.items()}
    ordered = sorted((t for t in tensors.values() if t.data.nbytes), key=lambda tensor: tensor.offset)
    for one, other in itertools.pairwise(ordered):
        if one.offset + one.data.nbytes > other.offset:
            raise FormatError(f"{path}: tensors {quoted(one.name)} and {quoted(other.name)} overlap: it is damaged")
    return tensors


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json: a key that occurs twice is an error, not a silent replacement."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _object(file: MappedFile, data: bytes) -> dict[str, Any]:
    try:
        header = json.loads(data, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file.path}: the header is not JSON ({error}): it is damaged, get it again") from None
    if not isinstance(header, dict):
        raise FormatError(f"{file.path}: the header is not a JSON object: no safetensors file")
    return header


def _tensor(file: MappedFile, name: str, entry: Any, start: int) -> Stored:
    """start: of the data."""
    what = f"{file.path}: tensor {quoted(name)}"
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UnsupportedError(f"{what} has the dtype {quoted(str(dtype))}: known are {' '.join(DTYPES)}")
    if not _sizes(shape) or len(shape) > _MAX_DIMS or not _sizes(offsets) or len(offsets) != 2:
        raise FormatError(f"{what} has no valid shape and data_offsets: the file is damaged, get it again")
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise FormatError(f"{what} of shape {shape} and type {dtype} takes {nbytes} bytes, not {end - begin}: damaged")
    if start + end > file.size:
        raise FormatError(
            f"{what} ends at byte {start + end}, but the file has only {file.size}: it is truncated, get it again"
        )
    return Stored(name, dtype, tuple(shape), file.bytes_at(start + begin, nbytes), file, start + begin)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 48 for size in value)
