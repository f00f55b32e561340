"""Tensors that are computed when their rows are read: views of a checkpoint in the layout of a GGUF file.

A Source can be used like any Tensor of a GGUF file. So a checkpoint is quantized, written or run without a copy of it
in memory or on disk. `gathered` only moves rows: the blocks of a quantized tensor stay as they are.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.coded import float8
from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.memory_file import MemoryFile
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.formats.safetensors import StoredArray

F32 = type_by_name("F32")
Array = NDArray[Any]


@dataclass(frozen=True)
class Source(Tensor):
    """A tensor whose rows are computed when they are read. Several threads may read at a time."""

    offset: int = field(default=0, init=False)  # means nothing
    # Returns the bytes of the blocks of rows first .. end, as an array of any shape and dtype.
    read: Callable[[int, int], Array] = field(repr=False, compare=False)
    # Is told that rows first .. end are not needed soon.
    free: Callable[[int, int], None] | None = field(default=None, repr=False, compare=False)

    def blocks(self, first: int = 0, end: int | None = None) -> NDArray[np.uint8]:
        end = self.n_rows if end is None else end
        data = np.ascontiguousarray(self.read(first, end)).reshape(-1).view(np.uint8)
        return data.reshape(end - first, self.type.row_bytes(self.ne[0]))

    def release(self, first: int = 0, end: int | None = None) -> None:
        if self.free:
            self.free(first, self.n_rows if end is None else end)


def same_values(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors have the same shape, type and blocks."""
    if (a.ne, a.type) != (b.ne, b.type):
        return False
    step = max(1, (1 << 24) // a.type.row_bytes(a.ne[0]))
    ranges = ((first, min(first + step, a.n_rows)) for first in range(0, a.n_rows, step))
    return all(np.array_equal(a.blocks(*part), b.blocks(*part)) for part in ranges)


def floats(stored: StoredArray) -> Tensor:
    """Return an array of a checkpoint as BF16, F16 or F32 (any other float). UnsupportedError if it holds no floats."""
    if not stored.dtype.startswith(("F", "BF")) or stored.dtype == "F8_E8M0":
        raise UnsupportedError(
            f"{stored.file.path}: tensor {quoted(stored.name)} has values of type {stored.dtype}: weights are "
            "F32, F16, BF16, F64, F8_E4M3 or F8_E5M2"
        )
    if 0 in stored.shape:
        raise FormatError(f"{stored.file.path}: tensor {quoted(stored.name)} of shape {stored.shape} has no values")
    array = stored.array().reshape(-1, *stored.shape[-1:])
    plain = stored.dtype in ("F32", "F16", "BF16")
    table = float8(stored.dtype) if array.dtype == np.uint8 else None

    def read(first: int, end: int) -> Array:
        part = array[first:end]
        return part if plain else part.astype(np.float32) if table is None else table[part]

    dtype = type_by_name(stored.dtype) if plain else F32
    return Source(stored.name, stored.shape[::-1] or (1,), dtype, stored.file, read, stored.release)


def computed(name: str, array: NDArray[np.float32], path: Path) -> Tensor:
    """Return values that no file holds as an F32 tensor. path: what errors name."""
    table = array.reshape(-1, array.shape[-1])
    return Source(name, array.shape[::-1], F32, MemoryFile(path, b""), lambda first, end: table[first:end])


def values(
    tensor: Tensor, function: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None, n: int = 0
) -> Tensor:
    """Return the tensor as F32.

    function: changes the values of some rows: float32[n_rows, ne[0]] -> [n_rows, n].
    n: the new length of rows; 0: it stays.
    """
    if function is None and tensor.type is F32:
        return tensor

    def read(first: int, end: int) -> Array:
        x = dequantize(tensor.blocks(first, end), tensor.type)
        return x if function is None else function(x)

    return Source(tensor.name, (n or tensor.ne[0], *tensor.ne[1:]), F32, tensor.file, read, tensor.release)


def gathered(name: str, tensors: Sequence[Tensor], index: NDArray[np.int64] | None, ne: tuple[int, ...]) -> Tensor:
    """Return rows of several tensors as one tensor of the sizes ne: in their type, or F32 if they have several types.

    index: rows, counted through all tensors; None: all rows in their order.
    """
    if len({tensor.type for tensor in tensors}) > 1:
        tensors = [values(tensor) for tensor in tensors]
    starts = np.cumsum([0, *(tensor.n_rows for tensor in tensors)])
    assert math.prod(ne[1:]) == (starts[-1] if index is None else len(index))

    def pieces(first: int, end: int) -> Iterator[tuple[Tensor, NDArray[np.int64], NDArray[np.int64]]]:
        """Yield each tensor of which rows are wanted, where in the result they go, and which rows they are."""
        asked = np.arange(first, end) if index is None else index[first:end]
        owner = np.searchsorted(starts, asked, "right") - 1
        for i in np.unique(owner).tolist():
            at = np.flatnonzero(owner == i)
            yield tensors[i], at, asked[at] - starts[i]

    def read(first: int, end: int) -> Array:
        out: Array = np.empty((end - first, tensors[0].type.row_bytes(ne[0])), np.uint8)
        for tensor, at, wanted in pieces(first, end):
            low, high = int(wanted.min()), int(wanted.max()) + 1
            found = tensor.blocks(low, high)
            if high - low != len(wanted) or (np.diff(wanted) != 1).any():
                found = found[wanted - low]
            if len(at) == end - first:
                return found
            out[at] = found
        return out

    def free(first: int, end: int) -> None:
        for tensor, _, wanted in pieces(first, end):
            tensor.release(int(wanted.min()), int(wanted.max()) + 1)

    return Source(name, ne, tensors[0].type, tensors[0].file, read, free)


def rows(tensor: Tensor, index: NDArray[np.int64], ne: tuple[int, ...]) -> Tensor:
    """Return rows `index` of the tensor, in that order, as a tensor of the sizes ne."""
    return gathered(tensor.name, [tensor], index, ne)


def padded(tensor: Tensor, n_rows: int) -> Tensor:
    """Return a tensor of n_rows rows: the tensor's, then rows of zeros."""
    row_bytes, n = tensor.type.row_bytes(tensor.ne[0]), n_rows - tensor.n_rows
    zeros = Source(
        "", (tensor.ne[0], n), tensor.type, tensor.file, lambda first, end: np.zeros((end - first, row_bytes), np.uint8)
    )
    return gathered(tensor.name, [tensor, zeros], None, (tensor.ne[0], n_rows))


def halves(tensor: Tensor, interleaved: bool, bias: bool) -> tuple[Tensor, Tensor]:
    """Split every matrix [2 n, n_in] of the tensor into its first and second n rows, or the even and the odd ones.

    A bias [..., 2 n] is split into its even and odd values.
    """
    n = tensor.ne[0 if bias else 1] // 2
    if bias:
        return values(tensor, lambda x: x[:, ::2], n), values(tensor, lambda x: x[:, 1::2], n)
    at = np.arange(tensor.n_rows, dtype=np.int64).reshape(-1, tensor.ne[1])
    parts = (at[:, ::2], at[:, 1::2]) if interleaved else (at[:, :n], at[:, n:])
    ne = (tensor.ne[0], n, *tensor.ne[2:])
    first, second = (rows(tensor, part.reshape(-1), ne) for part in parts)
    return first, second


def unpermuted(tensor: Tensor, n_head: int, back: bool = False) -> Tensor:
    """Put the rows of each head, which come as two halves for the rotation, in pairs: 0, n/2, 1, n/2 + 1, ...

    Of a bias the values are moved. back: put pairs into halves again.
    """
    head = np.arange(tensor.ne[-1], dtype=np.int64).reshape(n_head, 2, -1)
    index = head.swapaxes(1, 2).reshape(-1)
    index = np.argsort(index) if back else index
    return rows(tensor, index, tensor.ne) if len(tensor.ne) > 1 else values(tensor, lambda x: x[:, index])


def columns(tensor: Tensor, index: NDArray[np.int64]) -> Tensor:
    """Return columns `index` of a matrix of floats, in that order."""

    def read(first: int, end: int) -> Array:
        return tensor.blocks(first, end).view(tensor.type.dtype)[:, index]

    return Source(tensor.name, (len(index), *tensor.ne[1:]), tensor.type, tensor.file, read, tensor.release)


def transposed(tensor: Tensor) -> Tensor:
    """Swap rows and columns of every matrix of a tensor of floats."""
    n_out, n_in, *more = tensor.ne
    word = tensor.type.dtype

    def read(first: int, end: int) -> Array:
        parts = []
        for i in range(first // n_out, -(-end // n_out)):
            matrix = tensor.blocks(i * n_in, (i + 1) * n_in).view(word)
            parts.append(matrix[:, max(first - i * n_out, 0) : end - i * n_out].T)
        return np.concatenate(parts)

    return Source(tensor.name, (n_in, n_out, *more), tensor.type, tensor.file, read)
