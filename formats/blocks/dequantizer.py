"""Dequantize blocks of any tensor type to float32, bit for bit as the gguf package does, at compiled speed."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.coded import CODED_FORMS, decode
from gguf_run.formats.blocks.types import TensorType, type_by_name
from gguf_run.formats.blocks.unpack import INTEGER_FORMS
from gguf_run.formats.compiler.deferred import COMPILING
from gguf_run.formats.compiler.jit import njit, specialize
from gguf_run.formats.errors import FormatError

if COMPILING:
    from gguf_run.formats.blocks.scalars import f16

_CHUNK = 1 << 20  # weights per task: about 1 ms, so that small tensors start no threads

# Placeholders: specialize() replaces them by the values of a type.
unpack: Any = None
BLOCK_SIZE = TYPE_SIZE = GROUP = 0
HAS_MINIMUM = False


def _dequantize_blocks(src: Any, out: Any, grid: Any) -> None:
    """Dequantize whole blocks src u8[:] to out f32[:]. Rounds after each product and after the sum."""
    q = np.empty(BLOCK_SIZE, np.int8)
    scale = np.empty(BLOCK_SIZE // GROUP, np.float32)
    minimum = np.empty(BLOCK_SIZE // GROUP, np.float32)
    factor = np.ones(2, np.float32)
    for b in range(len(src) // TYPE_SIZE):
        unpack(src, b * TYPE_SIZE, q, scale, minimum, factor, grid)
        for g in range(BLOCK_SIZE // GROUP):
            to = b * BLOCK_SIZE + g * GROUP
            w = out[to : to + GROUP]
            q_g = q[g * GROUP : g * GROUP + GROUP]
            d = factor[0] * scale[g]
            if HAS_MINIMUM:
                m = factor[1] * minimum[g]
                for i in range(GROUP):
                    w[i] = d * np.float32(q_g[i]) + m
            else:  # to add a minimum of 0 would lose the sign of -0.0
                for i in range(GROUP):
                    w[i] = d * np.float32(q_g[i])


_Convert = Callable[[NDArray[np.uint8], NDArray[np.float32]], None]


@functools.cache
def _quantized(name: str) -> _Convert:
    """Return the converter of a block-quantized type. It is compiled at its first call."""
    form = INTEGER_FORMS[name]
    kernel = specialize(_dequantize_blocks, name, **form.constants)
    grid = form.grid()
    return lambda src, out: kernel(src, out, grid)


@njit
def _f16(src: Any, out: Any) -> None:
    """Convert f16. numpy takes five times as long."""
    for i in range(len(out)):
        out[i] = f16(src, 2 * i)


def _bf16(src: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """A bf16 is the upper half of an f32."""
    bits = out.view(np.uint32)
    bits[:] = src.view("<u2")
    bits <<= 16


def _number(dtype: np.dtype[Any]) -> _Convert:
    """Return the converter of a type that numpy knows. Values out of range become infinite, without a warning."""

    def convert(src: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        with np.errstate(all="ignore"):
            np.copyto(out, src.view(dtype), casting="unsafe")

    return convert


def _converter(type: TensorType) -> _Convert:
    if coded := CODED_FORMS.get(type.name):
        return lambda src, out: decode(src, type.type_size, coded.table, out)
    if type.is_quantized:
        return _quantized(type.name)
    return {"F16": _f16, "BF16": _bf16}.get(type.name) or _number(type.dtype)


def dequantize(blocks: NDArray[np.uint8], type: TensorType | str) -> NDArray[np.float32]:
    """Return the weights of blocks as float32, computed by several threads if there are many.

    blocks: uint8[..., n * type_size], n >= 0. They may be read-only and need not be contiguous.
    Returns float32[..., n * block_size], which shares no memory with blocks. It equals the gguf package's result
    (0.19) bit for bit; for Q1_0, Q2_0, Q8_1 and Q8_K, which that lacks, ggml's formulas. Integers and F64 are rounded.
    UnsupportedError for an unknown name of a type, FormatError if blocks are no rows of whole blocks.
    """
    type = type_by_name(type) if isinstance(type, str) else type
    if blocks.dtype != np.uint8 or blocks.ndim == 0 or blocks.shape[-1] % type.type_size:
        raise FormatError(
            f"{type.name} data of type {blocks.dtype} and shape {blocks.shape} is not made of whole blocks: expected "
            f"uint8 rows of a multiple of {type.type_size} bytes"
        )
    out = np.empty((*blocks.shape[:-1], blocks.shape[-1] // type.type_size * type.block_size), np.float32)
    src, flat = np.ascontiguousarray(blocks).reshape(-1, type.type_size), out.reshape(-1, type.block_size)
    src.flags.writeable = False  # one compiled version serves mapped files and arrays
    convert = _converter(type)
    step = _CHUNK // type.block_size

    def run(start: int) -> None:
        part = slice(start, start + step)
        convert(src[part].reshape(-1), flat[part].reshape(-1))

    starts = range(0, len(src), step)
    if len(starts) > 1:
        with ThreadPoolExecutor() as pool:
            list(pool.map(run, starts))  # list: raise what a task raised
    elif starts:
        run(0)
    return out
