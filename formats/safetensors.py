"""Safetensors files: a JSON header, then arrays. Checkpoints, sessions and saved logits are such files.

    n          uint64, little-endian: bytes of the header
    header     a JSON object: name -> {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [begin, end]}
               "__metadata__" -> an object of texts
    data       the arrays; offsets count from here

The reader checks every entry before the entry is used. https://github.com/huggingface/safetensors#format
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.atomic import replacing
from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.gguf.mapped import Cursor, MappedFile, quoted

MAX_HEADER_BYTES = 100 << 20  # the limit of the format's own library
_MAX_DIMS = 8
_METADATA = "__metadata__"

# Name in the file -> numpy's type of the values, or of the bits where numpy has no such type.
DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {name: np.dtype(code) for name, code in (
        ("F64", "<f8"), ("F32", "<f4"), ("F16", "<f2"), ("BF16", "<u2"), ("F8_E4M3", "u1"), ("F8_E5M2", "u1"),
        ("F8_E8M0", "u1"), ("I64", "<i8"), ("I32", "<i4"), ("I16", "<i2"), ("I8", "i1"), ("U64", "<u8"),
        ("U32", "<u4"), ("U16", "<u2"), ("U8", "u1"), ("BOOL", "u1"),
    )}
)  # fmt: skip


@dataclass(frozen=True)
class StoredArray:
    """An array in a file. Its bytes are read when they are used."""

    name: str
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]  # rows first, as in numpy
    data: NDArray[np.uint8] = field(repr=False, compare=False)  # all bytes, a view of the file
    file: MappedFile = field(repr=False, compare=False)
    offset: int = -1  # of the data in the file; -1: the file holds these bytes in another form

    def array(self) -> NDArray[Any]:
        """Return the values in the array's shape, read-only, as DTYPES says."""
        return self.data.view(DTYPES[self.dtype]).reshape(self.shape)

    def release(self, first: int, end: int) -> None:
        """Tell the OS that rows first .. end are not needed soon. All dimensions but the last count as rows."""
        row_bytes = self.data.nbytes // max(1, math.prod(self.shape[:-1]))
        if self.offset >= 0:
            self.file.release(self.offset + first * row_bytes, (end - first) * row_bytes)


@dataclass(frozen=True)
class SafetensorsFile:
    """A mapped file."""

    arrays: Mapping[str, StoredArray]  # by name, in the header's order
    metadata: Mapping[str, str]  # the texts under "__metadata__"


def read_safetensors(path: Path) -> SafetensorsFile:
    """Map a file. FormatError or UnsupportedError, one line, for anything wrong with its header or its size."""
    file = MappedFile(path)
    cursor = Cursor(file)
    if file.map[:4] == b"GGUF":
        raise cursor.error("is a GGUF file, no safetensors file")
    n = cursor.number("Q", "the length of the header")
    if n > MAX_HEADER_BYTES:
        raise cursor.error(f"the header has {n} bytes, at most {MAX_HEADER_BYTES} are allowed: no safetensors file", 0)
    start = cursor.skip(n, "the header") + n
    try:
        header = json.loads(bytes(file.map[8:start]), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: the header is not JSON ({error}): it is damaged, get it again") from None
    if not isinstance(header, dict):
        raise FormatError(f"{path}: the header is not a JSON object: no safetensors file")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path}: {_METADATA} is not an object of texts: the file is damaged, get it again")
    arrays = {name: _array(file, name, entry, start) for name, entry in header.items()}
    ordered = sorted((array for array in arrays.values() if array.data.nbytes), key=lambda array: array.offset)
    for one, other in itertools.pairwise(ordered):
        if one.offset + one.data.nbytes > other.offset:
            raise FormatError(f"{path}: tensors {quoted(one.name)} and {quoted(other.name)} overlap: it is damaged")
    return SafetensorsFile(arrays, metadata)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json's object_pairs_hook: ValueError for a key that occurs twice, which json would replace silently."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _array(file: MappedFile, name: str, entry: Any, start: int) -> StoredArray:
    """Check one entry of the header. start: offset of the data in the file."""
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
    return StoredArray(name, dtype, tuple(shape), file.bytes_at(start + begin, nbytes), file, start + begin)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 48 for size in value)


@contextmanager
def writing_safetensors(
    path: Path, arrays: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Callable[[str, Any], None]]:
    """Write a file of arrays whose sizes are known and whose values are still to come.

    arrays: name -> (a key of DTYPES, the shape), in the order of the file.
    metadata: the texts under "__metadata__".

    Yields `append(name, data)`. It writes the next bytes of an array from a contiguous buffer of any type. Calls for
    different arrays may alternate. The file replaces `path` when the block ends and all arrays are full. If the block
    raises, `path` stays as it was. OSError if the file cannot be written.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in arrays.items():
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins at a multiple of 8
    start = 8 + len(text)
    # Where the next bytes of each array go, and where the array ends.
    next_at = {name: start + header[name]["data_offsets"][0] for name in arrays}
    end_at = {name: start + header[name]["data_offsets"][1] for name in arrays}

    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)

        def append(name: str, data: Any) -> None:
            assert next_at[name] + memoryview(data).nbytes <= end_at[name], f"{name}: more bytes than its shape takes"
            if file.tell() != next_at[name]:
                file.seek(next_at[name])
            next_at[name] += file.write(data)

        yield append
        assert next_at == end_at, "bytes of an array are missing"
