"""Tensors that are computed when their rows are read: views of a checkpoint in the layout of a GGUF file.

A Source stands wherever a tensor of a GGUF file does (Tensor): its rows are blocks of its type. So a checkpoint is
quantized, written or run without a copy of it in memory or on disk. Rows keep their blocks when they are only moved
(`rows`, `stacked`), so a tensor that is quantized already passes through unchanged.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import TensorType, type_by_name
from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.gguf.mapped import MappedFile, quoted
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.formats.safetensors import StoredArray

F32 = type_by_name("F32")
Array = NDArray[Any]


def _nothing(first: int, end: int) -> None:
    """Release no memory."""


@dataclass(frozen=True)
class Source(Tensor):
    """read(first, end): rows first .. end, an array of any shape and dtype with the bytes of their blocks. free(first,
    end): those rows are not needed soon. Both are called from several threads. offset means nothing here."""

    read: Callable[[int, int], Array] = field(repr=False, compare=False)
    free: Callable[[int, int], None] = field(default=_nothing, repr=False, compare=False)

    def blocks(self, first: int = 0, end: int | None = None) -> NDArray[np.uint8]:
        end = self.n_rows if end is None else end
        data = np.ascontiguousarray(self.read(first, end)).reshape(-1).view(np.uint8)
        return data.reshape(end - first, self.type.row_bytes(self.ne[0]))

    def release(self, first: int = 0, end: int | None = None) -> None:
        self.free(first, self.n_rows if end is None else end)


def source(
    name: str,
    shape: Sequence[int],
    type: TensorType,
    file: MappedFile,
    read: Callable[[int, int], Array],
    free: Callable[[int, int], None] = _nothing,
) -> Source:
    """Return a tensor of that shape in the checkpoint's order (rows last): ne is the shape reversed."""
    return Source(name, tuple(reversed(shape)) or (1,), type, 0, file, read, free)


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
    if stored.dtype in ("F32", "F16", "BF16"):
        dtype = type_by_name(stored.dtype)
        return source(stored.name, stored.shape, dtype, stored.file, lambda a, b: array[a:b], stored.release)
    table = float8(stored.dtype) if array.dtype == np.uint8 else None

    def read(first: int, end: int) -> Array:
        part = array[first:end]
        return part.astype(np.float32) if table is None else table[part]

    return source(stored.name, stored.shape, F32, stored.file, read, stored.release)


def float8(dtype: str) -> NDArray[np.float32]:
    """Return the value of each of the 256 codes of F8_E4M3 (no infinities; 0x7f and 0xff are NaN) or F8_E5M2."""
    codes = np.arange(256, dtype=np.uint16)
    if dtype == "F8_E5M2":
        return (codes << 8).view(np.float16).astype(np.float32)  # the upper half of an F16
    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    size = np.where(exponent > 0, np.ldexp(8 + mantissa, exponent - 10), np.ldexp(mantissa, -9))
    size[codes & 127 == 127] = np.nan
    return np.where(codes & 128, -size, size).astype(np.float32)


def renamed(tensor: Tensor, name: str) -> Tensor:
    """Return the tensor under another name."""
    return replace(tensor, name=name)


def values(tensor: Tensor, function: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None) -> Tensor:
    """Return the tensor as F32, each row's values changed by `function` (of and to float32[rows, n])."""
    if function is None and tensor.type is F32:
        return tensor

    def read(first: int, end: int) -> Array:
        x = dequantize(tensor.blocks(first, end), tensor.type)
        return x if function is None else function(x)

    return Source(tensor.name, tensor.ne, F32, 0, tensor.file, read, tensor.release)


def rows(tensor: Tensor, index: NDArray[np.int64], ne: tuple[int, ...]) -> Tensor:
    """Return rows `index` of the tensor, in that order, as a tensor of ne."""
    assert len(index) == math.prod(ne[1:])

    def read(first: int, end: int) -> Array:
        wanted = index[first:end]
        low, high = int(wanted.min()), int(wanted.max()) + 1
        if high - low == len(wanted) and (np.diff(wanted) == 1).all():
            return tensor.blocks(low, high)
        return tensor.blocks(low, high)[wanted - low]

    def free(first: int, end: int) -> None:
        wanted = index[first:end]
        tensor.release(int(wanted.min()), int(wanted.max()) + 1)

    return Source(tensor.name, ne, tensor.type, 0, tensor.file, read, free)


def halves(tensor: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Split every matrix [2 n, n_in] of the tensor into its first and second n rows, or the even and the odd ones."""
    n = tensor.ne[1] // 2
    at = np.arange(tensor.n_rows, dtype=np.int64).reshape(-1, tensor.ne[1])
    parts = (at[:, ::2], at[:, 1::2]) if interleaved else (at[:, :n], at[:, n:])
    ne = (tensor.ne[0], n, *tensor.ne[2:])
    first, second = (rows(tensor, part.reshape(-1), ne) for part in parts)
    return first, second


def unpermuted(tensor: Tensor, n_head: int, back: bool = False) -> Tensor:
    """Put the rows of each head, which come as two halves for the rotation, in pairs: 0, n/2, 1, n/2 + 1, ...

    A bias has a value, not a row, for each row of its matrix. back: undo that.
    """
    head = np.arange(tensor.ne[-1], dtype=np.int64).reshape(n_head, 2, -1)
    index = head.swapaxes(1, 2).reshape(-1)
    index = np.argsort(index) if back else index
    return rows(tensor, index, tensor.ne) if len(tensor.ne) > 1 else values(tensor, lambda x: x[:, index])


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

    return Source(tensor.name, (n_in, n_out, *more), tensor.type, 0, tensor.file, read)


def stacked(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors of one shape and type as one with one dimension more."""
    one = tensors[0]
    n_rows = one.n_rows

    def pieces(first: int, end: int) -> list[tuple[Tensor, int, int]]:
        return [
            (tensors[i], max(first - i * n_rows, 0), min(end - i * n_rows, n_rows))
            for i in range(first // n_rows, -(-end // n_rows))
        ]

    def read(first: int, end: int) -> Array:
        return np.concatenate([tensor.blocks(a, b) for tensor, a, b in pieces(first, end)])

    def free(first: int, end: int) -> None:
        for tensor, a, b in pieces(first, end):
            tensor.release(a, b)

    return Source(name, (*one.ne, len(tensors)), one.type, 0, one.file, read, free)


def gathered(tensors: Sequence[Tensor], index: NDArray[np.int64], ne: tuple[int, ...]) -> Tensor:
    """Return rows `index` of several tensors, counted through all of them, as one F32 tensor of ne."""
    starts = np.cumsum([0, *(tensor.n_rows for tensor in tensors)])
    assert len(index) == math.prod(ne[1:])

    def read(first: int, end: int) -> Array:
        wanted = index[first:end]
        out = np.empty((len(wanted), ne[0]), np.float32)
        for tensor, start, stop in zip(tensors, starts[:-1], starts[1:], strict=True):
            at = np.flatnonzero((wanted >= start) & (wanted < stop))
            if len(at):
                inner = wanted[at] - start
                low = int(inner.min())
                out[at] = dequantize(tensor.blocks(low, int(inner.max()) + 1), tensor.type)[inner - low]
        return out

    return Source(tensors[0].name, ne, F32, 0, tensors[0].file, read)


def columns(tensor: Tensor, start: int, step: int) -> Tensor:
    """Return every step-th column from `start` on, as F32."""
    ne = (len(range(start, tensor.ne[0], step)), *tensor.ne[1:])

    def read(first: int, end: int) -> Array:
        return dequantize(tensor.blocks(first, end), tensor.type)[:, start::step]

    return Source(tensor.name, ne, F32, 0, tensor.file, read, tensor.release)
