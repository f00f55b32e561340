"""File blocks to panels (panels.py has the layouts), at load, all threads."""

import functools
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.dequantize import dequantize
from gguf_run.formats.jit import njit, specialize
from gguf_run.formats.reader import Tensor
from gguf_run.formats.unpack import INTEGER_FORMS
from gguf_run.kernels_cpu.panels import BLOCK, PANEL_OF, ROWS, FloatPanel, IntPanel, Panel, panel_for

_LEAST_BYTES, _MOST_BYTES = 1 << 17, 1 << 22  # panels that a thread makes at a time

# Names that `specialize` puts into _repack_int; here for the type checker.
unpack: Any = None
BLOCK_SIZE = TYPE_SIZE = N_GROUPS = GROUP = OFFSET = BITS = HEAD_BYTES = BLOCK_BYTES = 0
HALF_SCALES = HAS_MINIMUM = False


@njit(inline="always")
def _half_bits(value):  # type: ignore[no-untyped-def]
    """The f16 bits of an f32 that came from an f16: exact, so nothing is rounded."""
    bits = np.float32(value).view(np.uint32)
    sign, magnitude = bits >> 16 & 0x8000, bits & 0x7FFFFFFF
    if magnitude >= 0x7F800000:  # infinity, nan
        return np.uint16(sign | 0x7C00 | magnitude >> 13 & 0x3FF)
    if magnitude < 113 << 23:  # subnormal in f16
        return np.uint16(sign | np.uint32(np.uint32(magnitude).view(np.float32) * np.float32(2.0**24)))
    return np.uint16(sign | (magnitude - (112 << 23)) >> 13)


@njit(inline="always")
def _pack(u, packed):  # type: ignore[no-untyped-def]
    """A row's 32 numbers as its 4 bytes in each plane of panels.py."""
    n = len(packed)
    if n == BLOCK:
        for i in range(BLOCK):  # packed[:] = u would cost 2 s of compiling: numba's message for unequal shapes
            packed[i] = u[i]
        return
    for i in range(16):
        packed[i] = u[i] & 15 | u[16 + i] << 4
    for c in range(4 if n > 16 else 0):
        low, high = 0, 0
        for i in range(8):
            top = u[4 * i + c] >> 4
            if n == 20:
                low |= top << i
            elif i < 4:
                low |= top << 2 * i
            else:
                high |= top << 2 * (i - 4)
        packed[16 + c] = low
        if n == 24:
            packed[20 + c] = high


def _repack_int(src, row_bytes, n_rows, n_in, grid, out, first, end):  # type: ignore[no-untyped-def]
    """Groups first .. end of 16 rows. src: uint8[n_rows * row_bytes], out: uint8[n_group * group_bytes]."""
    n_scales = BLOCK_SIZE // GROUP
    q, u = np.empty(BLOCK_SIZE, np.int8), np.empty(BLOCK_SIZE, np.uint8)
    scale, minimum = np.empty(n_scales, np.float32), np.zeros(n_scales, np.float32)
    packed = np.empty(4 * BITS, np.uint8)  # a row's bytes of all planes
    words = packed.view(np.uint32)
    halves, floats, out_words = out.view(np.uint16), out.view(np.float32), out.view(np.uint32)
    per_block, n_type_block = BLOCK_SIZE // BLOCK, n_in // BLOCK_SIZE
    for group in range(first, end):
        for b in range(n_type_block):
            at = (group * n_type_block + b) * per_block * BLOCK_BYTES
            for r in range(ROWS):
                row = group * ROWS + r
                if row < n_rows:
                    unpack(src, row * row_bytes + b * TYPE_SIZE, q, scale, minimum, grid)
                else:  # rows that fill the last panel
                    q[:] = 0
                    scale[:] = 0
                    minimum[:] = 0
                for i in range(BLOCK_SIZE):
                    u[i] = np.uint8(np.int16(q[i]) + OFFSET)
                for k in range(per_block):
                    to = at + k * BLOCK_BYTES
                    for g in range(N_GROUPS):
                        i = k * N_GROUPS + g
                        if HALF_SCALES:
                            halves[(to >> 1) + g * ROWS + r] = _half_bits(scale[i])
                            if HAS_MINIMUM:
                                halves[(to >> 1) + (N_GROUPS + g) * ROWS + r] = _half_bits(minimum[i])
                        else:
                            floats[(to >> 2) + g * ROWS + r] = scale[i]
                            if HAS_MINIMUM:
                                floats[(to >> 2) + (N_GROUPS + g) * ROWS + r] = minimum[i]
                    _pack(u[k * BLOCK : (k + 1) * BLOCK], packed)
                    for i in range(BITS):
                        out_words[(to + HEAD_BYTES >> 2) + i * ROWS + r] = words[i]


@functools.cache
def _repack_int_for(type_name: str) -> Callable[..., None]:
    form, panel = INTEGER_FORMS[type_name], PANEL_OF[type_name]
    assert isinstance(panel, IntPanel)
    return specialize(
        _repack_int,
        type_name,
        unpack=form.unpack,
        BLOCK_SIZE=form.type.block_size,
        TYPE_SIZE=form.type.type_size,
        N_GROUPS=panel.n_groups,
        GROUP=form.group,
        OFFSET=panel.offset,
        BITS=panel.bits,
        HEAD_BYTES=panel.head_bytes,
        BLOCK_BYTES=panel.block_bytes,
        HALF_SCALES=panel.half_scales,
        HAS_MINIMUM=panel.has_minimum,
    )


@njit
def _repack_float(src, n_rows, n_in, out, first, end):  # type: ignore[no-untyped-def]
    """src: [n_rows * n_in], out: [n_group * n_in * 16], both unsigned integers of the element's width."""
    for group in range(first, end):
        for r in range(ROWS):
            row = group * ROWS + r
            for i in range(n_in):
                out[(group * n_in + i) * ROWS + r] = src[row * n_in + i] if row < n_rows else 0


def repack(tensors: list[Tensor], out: NDArray[np.uint8], executor: Executor, n_threads: int) -> None:
    """Fill out, uint8[n_group * group_bytes], with the rows of matrices of one type and width, stacked.

    All but the last have a number of rows that 16 divides.
    """
    panel = panel_for(tensors[0].type.name)
    jobs = []
    at = 0
    for tensor in tensors:
        n_in = tensor.ne[0]
        n_group = -(-tensor.n_rows // ROWS)
        part = out[at : (at := at + n_group * panel.group_bytes(n_in))]
        work = _work(tensor, panel, part)
        piece = min(max(part.nbytes // (4 * n_threads), _LEAST_BYTES), _MOST_BYTES)
        pieces = max(1, min(n_group, part.nbytes // piece))
        jobs += [executor.submit(work, n_group * i // pieces, n_group * (i + 1) // pieces) for i in range(pieces)]
    for job in jobs:
        job.result()


def _work(tensor: Tensor, panel: Panel, out: NDArray[np.uint8]) -> Callable[[int, int], None]:
    blocks, n_rows, n_in = tensor.blocks(), tensor.n_rows, tensor.ne[0]
    if isinstance(panel, FloatPanel):
        if tensor.type.name != panel.name:
            blocks = dequantize(blocks, tensor.type).view(np.uint8)
        word = np.dtype(f"u{panel.element_bytes}")
        src, to = blocks.reshape(-1).view(word), out.view(word)
        make = functools.partial(_repack_float, src, n_rows, n_in, to)
    else:
        grid = INTEGER_FORMS[tensor.type.name].grid()
        flat, row_bytes = blocks.reshape(-1), blocks.shape[-1]
        make = functools.partial(_repack_int_for(tensor.type.name), flat, row_bytes, n_rows, n_in, grid, out)

    def work(first: int, end: int) -> None:
        make(first, end)
        tensor.release(first * ROWS, min(end * ROWS, n_rows))  # or a large tensor is in memory twice

    return work
