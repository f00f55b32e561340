"""Blocks of a file become panels at load, by all threads. panels.py has the layouts."""

import functools
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.coded import CODES_AT, CODES_OF_4_BITS
from gguf_run.formats.blocks.unpack import INTEGER_FORMS
from gguf_run.formats.compiler.deferred import COMPILING
from gguf_run.formats.compiler.jit import njit, specialize
from gguf_run.formats.errors import FormatError
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.kernels_cpu.panels.panels import (
    FLOAT8_FACTOR,
    ROWS,
    CodedPanel,
    FloatPanel,
    IntPanel,
    Panel,
    panel_for,
    panel_id,
)

if COMPILING:
    from gguf_run.kernels_cpu.panels.pack import pack
    from gguf_run.kernels_cpu.vector.native import f32_at

_FORMS = {**INTEGER_FORMS, **CODES_OF_4_BITS}
_LEAST_BYTES, _MOST_BYTES = 1 << 17, 1 << 22  # bytes of panels that a thread makes at a time

# Placeholders: `specialize` replaces them in _repack_int.
unpack: Any = None
PANEL = BLOCK_SIZE = TYPE_SIZE = GROUP = BYTES = ROWS_AT = 0


def _repack_int(src, row_bytes, n_rows, n_in, grid, times, out, first, end):
    """Repack groups `first` to `end` - 1 of 16 rows.

    src: u8[n_rows * row_bytes]. times: f32 factors of equal shares of the rows. out: address of the panels.
    """
    group_bytes = ROWS_AT + n_in // BLOCK_SIZE * BYTES
    n_scales = BLOCK_SIZE // GROUP
    q = np.zeros((ROWS, BLOCK_SIZE), np.int8)
    scale, minimum = np.zeros((n_scales, ROWS), np.float32), np.zeros((n_scales, ROWS), np.float32)
    factor = np.zeros((2, ROWS), np.float32)
    row_scale, row_minimum = np.zeros(n_scales, np.float32), np.zeros(n_scales, np.float32)
    row_factor, more = np.ones(2, np.float32), np.ones(ROWS, np.float32)
    for group in range(first, end):
        rows = min(ROWS, n_rows - group * ROWS)
        if rows < ROWS:  # the last panel has spare rows
            q[:] = 0
            scale[:] = 0
            minimum[:] = 0
            factor[:] = 0
        for r in range(rows):  # once for all blocks: divisions are slow
            more[r] = times[(group * ROWS + r) * len(times) // n_rows]
        for b in range(n_in // BLOCK_SIZE):
            for r in range(rows):
                at = (group * ROWS + r) * row_bytes + b * TYPE_SIZE
                unpack(src, at, q[r], row_scale, row_minimum, row_factor, grid)
                for g in range(n_scales):
                    scale[g, r], minimum[g, r] = row_scale[g] * more[r], row_minimum[g]
                factor[0, r], factor[1, r] = row_factor[0], row_factor[1]
            if b == 0 and ROWS_AT:  # one scale for each row
                f32_at(out + group * group_bytes, ROWS)[:] = scale[0]
            to = out + group * group_bytes + ROWS_AT + b * BYTES
            pack(PANEL, BLOCK_SIZE, q.ctypes.data, scale.ctypes.data, minimum.ctypes.data, factor.ctypes.data, to)


@functools.cache
def _repack_int_for(type_name: str) -> Callable[..., None]:
    form, panel = _FORMS[type_name], panel_for(type_name)
    assert isinstance(panel, IntPanel)
    sizes = {"ROWS_AT": panel.rows_at, "BYTES": form.type.block_size // panel.span * panel.span_bytes}
    return specialize(_repack_int, type_name, PANEL=panel_id(panel), **sizes, **form.constants)


@njit
def _repack_float(src, n_rows, n_in, out, first, end):
    """Repack groups `first` to `end` - 1 of 16 rows of floats.

    src: [n_rows * n_in]. out: [n_group * n_in * 16]. Both are unsigned integers of the element's width.
    """
    for group in range(first, end):
        for r in range(ROWS):
            row = group * ROWS + r
            for i in range(n_in):
                out[(group * n_in + i) * ROWS + r] = src[row * n_in + i] if row < n_rows else 0


@njit
def _repack_codes(src, type_size, n_rows, is_8_bits, out, first, end):
    """Repack the codes of groups `first` to `end` - 1 of 16 rows of a coded type.

    src: u8[n_rows, row_bytes]. out: u8[n_group, bytes of codes].
    """
    size = type_size - CODES_AT
    for group in range(first, end):
        for r in range(min(ROWS, n_rows - group * ROWS)):
            row, to = src[group * ROWS + r], out[group]
            for b in range(len(row) // type_size):
                for i in range(size):
                    code = row[b * type_size + CODES_AT + i]
                    if is_8_bits:
                        to[(b * size + i & -2) * ROWS + 2 * r + i % 2] = code
                    else:
                        to[(b * size + i) * ROWS + r] = code << 4 | code >> 4


def floats(tensor: Tensor) -> NDArray[np.float32]:
    """Return the numbers of a tensor as f32[..., row]. Those of F32 stay in the file."""
    if tensor.type.name == "F32":
        return tensor.blocks().view(np.float32)
    from gguf_run.formats.blocks.dequantizer import dequantize  # late: norms and biases mostly are F32

    return dequantize(tensor.blocks(), tensor.type)


def repack(tensors: list[Tensor], out: NDArray[np.uint8], executor: Executor, n_threads: int) -> list[Future[None]]:
    """Begin to repack matrices of one type and width, stacked, into out, u8[n_group * group_bytes].

    The number of rows of each matrix except the last must be a multiple of 16. Returns the jobs given to the executor.
    """
    panel = panel_for(tensors[0].type.name)
    jobs: list[Future[None]] = []
    at = 0
    for tensor in tensors:
        n_in = tensor.ne[0]
        n_group = -(-tensor.n_rows // ROWS)
        part = out[at : (at := at + n_group * panel.group_bytes(n_in))]
        work = _work(tensor, panel, part)
        piece = min(max(part.nbytes // (4 * n_threads), _LEAST_BYTES), _MOST_BYTES)
        pieces = max(1, min(n_group, part.nbytes // piece))
        jobs += [executor.submit(work, n_group * i // pieces, n_group * (i + 1) // pieces) for i in range(pieces)]
    return jobs


def _repack_coded(
    tensor: Tensor, panel: CodedPanel, blocks: NDArray[np.uint8], out: NDArray[np.uint8], first: int, end: int
) -> None:
    """Repack groups `first` to `end` - 1 of 16 rows of a coded type. out: u8[n_group, group_bytes]."""
    n_in, dtype = tensor.ne[0], tensor.type.dtype
    scale = blocks[first * ROWS : end * ROWS].view(dtype)["d"] * np.float32(FLOAT8_FACTOR.get(panel.name, 1))
    scale = np.pad(scale, ((0, -len(scale) % ROWS), (0, 0)), "edge" if panel.shared else "constant")
    groups = scale.reshape(end - first, ROWS, -1).swapaxes(1, 2)
    if panel.shared and (groups != groups[..., :1]).any():
        what = "16 rows that follow each other have several scales for the same columns"
        raise FormatError(f"{tensor.name}: {what}, in {tensor.type.name} they must have one: give --quantize Q8_0")
    kept = groups[:, : None if panel.span else 1, : 1 if panel.shared else None]
    out[first:end, : 4 * panel.n_scales(n_in)].view(np.float32)[:] = kept.reshape(end - first, -1)
    codes = out[:, -(n_in // panel.columns * panel.step_bytes) :]
    _repack_codes(blocks, dtype.itemsize, tensor.n_rows, not panel.table, codes, first, end)


def _work(tensor: Tensor, panel: Panel, out: NDArray[np.uint8]) -> Callable[[int, int], None]:
    """Return a function that repacks groups `first` to `end` - 1 of 16 rows of a tensor."""
    blocks, n_rows, n_in = tensor.blocks(), tensor.n_rows, tensor.ne[0]
    make: Callable[[int, int], None]
    if isinstance(panel, CodedPanel):
        make = functools.partial(_repack_coded, tensor, panel, blocks, out.reshape(-1, panel.group_bytes(n_in)))
    elif isinstance(panel, FloatPanel):
        if tensor.type.name != panel.name or (tensor.scales and panel.name == "F32"):
            numbers = floats(tensor)
            if tensor.scales:
                share = np.arange(n_rows) * len(tensor.scales) // n_rows
                numbers = numbers * np.array(tensor.scales, np.float32)[share, None]
            blocks = numbers.view(np.uint8)
        word = np.dtype(f"u{panel.element_bytes}")
        src, to = blocks.reshape(-1).view(word), out.view(word)
        make = functools.partial(_repack_float, src, n_rows, n_in, to)
    else:
        # a panel with a codebook holds codes: with this grid the unpacker returns them
        grid = np.arange(len(panel.codebook), dtype=np.int8) if panel.codebook else _FORMS[tensor.type.name].grid()
        grid.flags.writeable = False
        flat, row_bytes = blocks.reshape(-1), blocks.shape[-1]
        repack_int = _repack_int_for(tensor.type.name)
        times = np.array(tensor.scales or (1,), np.float32)
        make = functools.partial(repack_int, flat, row_bytes, n_rows, n_in, grid, times, out.ctypes.data)

    def work(first: int, end: int) -> None:
        make(first, end)
        tensor.release(first * ROWS, min(end * ROWS, n_rows))  # else a large tensor is in memory twice

    return work
