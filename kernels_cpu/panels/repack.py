"""Blocks of a file become panels at load, by all threads. panels.py has the layouts."""

import functools
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.unpack import INTEGER_FORMS
from gguf_run.formats.compiler.jit import njit, specialize
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.kernels_cpu.panels.panels import (
    BLOCK,
    PANELS,
    PARTS,
    ROWS,
    FloatPanel,
    IntPanel,
    Panel,
    panel_for,
    panel_id,
)
from gguf_run.kernels_cpu.vector.lowering import simd_kernel
from gguf_run.kernels_cpu.vector.simd import F16, F32, I8, I16, I32, Simd, Val

_LEAST_BYTES, _MOST_BYTES = 1 << 17, 1 << 22  # bytes of panels that a thread makes at a time

# Placeholders: `specialize` replaces them in _repack_int.
unpack: Any = None
PANEL = BLOCK_SIZE = TYPE_SIZE = GROUP = BYTES = 0


@simd_kernel
def _pack(s: Simd, panel: int, n_columns: int, q: Val, scale: Val, minimum: Val, factor: Val, out: Val) -> None:
    """Pack the unpacked blocks of 16 rows into spans of their panel.

    panel: place in PANELS.
    n_columns: a multiple of the panel's span.
    q: address of int8[16][n_columns].
    scale, minimum: addresses of f32[n_columns / group][16].
    factor: address of f32[2][16].
    out: address of the spans.
    """
    shape = PANELS[panel]
    assert isinstance(shape, IntPanel)

    def span(n: Val) -> None:
        to = out + n * shape.span_bytes
        for i in range(shape.n_factors):
            s.store(s.load(factor + 64 * i, F32, ROWS).to(F16), to + 2 * ROWS * i)
        s.each(shape.n_steps, lambda i: step(n * shape.n_steps + i, i, to))

    def step(k: Val, i: Val, to: Val) -> None:
        """Pack step k of all steps, which is step i of the span at `to`."""
        per = shape.columns // shape.group
        numbers = [at + k * (4 * ROWS * per) for at in (scale, minimum)[: 1 + shape.has_minimum]]
        fields = _heads(s, shape, [s.load(at + 4 * ROWS * g, F32, ROWS) for at in numbers for g in range(per)])
        head = to + i * shape.head_bytes + 2 * ROWS * shape.n_factors
        for n, field in enumerate(fields):
            s.store(field, head + shape.head_bytes // len(fields) * n)
        quants = to + i * shape.step_bytes + shape.quants_at
        for b in range(shape.columns // BLOCK):
            at = q + k * shape.columns + BLOCK * b
            vectors = _across(s, [s.load(at + n_columns * r, I32, BLOCK // 4) for r in range(ROWS)])
            for n, plane in enumerate(_planes(shape, vectors)):
                s.store(plane, quants + 64 * (shape.bits * b + n))

    s.each(n_columns // shape.span, span)


def _across(s: Simd, rows: list[Val]) -> list[Val]:
    """Transpose 16 rows of 8 words to 8 vectors of 16: interleave row r with row r + 8, then r + 4, r + 2, r + 1."""
    vectors = [s.zip(rows[r], rows[r + 8], 0, 8) for r in range(8)]
    for distance in (4, 2, 1):
        # a vector holds words of several rows, of fewer and fewer columns
        count = len(vectors) // (2 * distance)
        pairs = [
            (vectors[c * 2 * distance + r], vectors[c * 2 * distance + r + distance])
            for c in range(count)
            for r in range(distance)
        ]
        halves = [[s.zip(a, b, first, 8) for a, b in pairs] for first in (0, 8)]
        vectors = [
            value for c in range(count) for half in halves for value in half[c * distance : c * distance + distance]
        ]
    return [vector.as_type(I8) for vector in vectors]


def _planes(panel: IntPanel, vectors: list[Val]) -> list[Val]:
    """Return the planes (panels.py) of eight vectors of q, or of codes."""
    u = vectors if panel.codebook else [v + panel.offset for v in vectors]
    planes: list[Val] = []
    bit = 0
    for width in PARTS[panel.bits]:
        mask = (1 << width) - 1
        for plane in range(width):
            parts = [_shifted((u[i] >> bit) & mask, width * (i // width)) for i in range(plane, 8, width)]
            planes.append(functools.reduce(lambda a, b: a | b, parts))
        bit += width
    return planes


def _shifted(v: Val, left: int) -> Val:
    return (v.as_type(I16) << left).as_type(I8)  # no bit leaves its byte


def _heads(s: Simd, panel: IntPanel, numbers: list[Val]) -> list[Val]:
    """Return the fields of a step's head. numbers: the scales of the step, then its minimums."""
    words = [v.to(I32) for v in numbers] if panel.scales.shared else []
    n = panel.columns // panel.group
    match panel.scales.name:
        case "f16":
            return [v.to(F16) for v in numbers]
        case "f32":
            return numbers
        case "k8":
            return [v.to(I8) for v in words]
        case "k4":
            return [(words[g] | words[n + g] << 4).to(I8) for g in range(n)]
        case "k6":
            six = words if panel.has_minimum else [v + 32 for v in words]
            return [(six[i] | ((six[3] >> 2 * i) & 3) << 6).to(I8) for i in range(3)]
        case _:  # e8m0: see e8m0_half
            bits = numbers[0].as_type(I32)
            e = s.select((bits >> 23).compare("==", 0), (bits >> 22) & 1, (bits >> 23) + 1)
            return [e.to(I8)]


def _repack_int(src, row_bytes, n_rows, n_in, grid, times, out, first, end):
    """Repack groups `first` to `end` - 1 of 16 rows.

    src: u8[n_rows * row_bytes]. times: f32 factors of equal shares of the rows. out: address of the panels.
    """
    n_scales = BLOCK_SIZE // GROUP
    q = np.zeros((ROWS, BLOCK_SIZE), np.int8)
    scale, minimum = np.zeros((n_scales, ROWS), np.float32), np.zeros((n_scales, ROWS), np.float32)
    factor = np.zeros((2, ROWS), np.float32)
    row_scale, row_minimum = np.zeros(n_scales, np.float32), np.zeros(n_scales, np.float32)
    row_factor = np.ones(2, np.float32)
    for group in range(first, end):
        rows = min(ROWS, n_rows - group * ROWS)
        if rows < ROWS:  # the last panel has spare rows
            q[:] = 0
            scale[:] = 0
            minimum[:] = 0
            factor[:] = 0
        for b in range(n_in // BLOCK_SIZE):
            for r in range(rows):
                at = (group * ROWS + r) * row_bytes + b * TYPE_SIZE
                unpack(src, at, q[r], row_scale, row_minimum, row_factor, grid)
                more = times[(group * ROWS + r) * len(times) // n_rows]
                for g in range(n_scales):
                    scale[g, r], minimum[g, r] = row_scale[g] * more, row_minimum[g]
                factor[0, r], factor[1, r] = row_factor[0], row_factor[1]
            to = out + group * (n_in // BLOCK_SIZE) * BYTES + b * BYTES
            _pack(PANEL, BLOCK_SIZE, q.ctypes.data, scale.ctypes.data, minimum.ctypes.data, factor.ctypes.data, to)


@functools.cache
def _repack_int_for(type_name: str) -> Callable[..., None]:
    form, panel = INTEGER_FORMS[type_name], panel_for(type_name)
    n_bytes = panel.group_bytes(form.type.block_size)
    return specialize(_repack_int, type_name, PANEL=panel_id(panel), BYTES=n_bytes, **form.constants)


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


def _work(tensor: Tensor, panel: Panel, out: NDArray[np.uint8]) -> Callable[[int, int], None]:
    """Return a function that repacks groups `first` to `end` - 1 of 16 rows of a tensor."""
    blocks, n_rows, n_in = tensor.blocks(), tensor.n_rows, tensor.ne[0]
    if isinstance(panel, FloatPanel):
        if tensor.type.name != panel.name:
            blocks = dequantize(blocks, tensor.type).view(np.uint8)
        word = np.dtype(f"u{panel.element_bytes}")
        src, to = blocks.reshape(-1).view(word), out.view(word)
        make = functools.partial(_repack_float, src, n_rows, n_in, to)
    else:
        # a panel with a codebook holds codes: with this grid the unpacker returns them
        grid = (
            np.arange(len(panel.codebook), dtype=np.int8) if panel.codebook else INTEGER_FORMS[tensor.type.name].grid()
        )
        grid.flags.writeable = False
        flat, row_bytes = blocks.reshape(-1), blocks.shape[-1]
        repack_int = _repack_int_for(tensor.type.name)
        times = np.array(tensor.scales or (1,), np.float32)
        make = functools.partial(repack_int, flat, row_bytes, n_rows, n_in, grid, times, out.ctypes.data)

    def work(first: int, end: int) -> None:
        make(first, end)
        tensor.release(first * ROWS, min(end * ROWS, n_rows))  # else a large tensor is in memory twice

    return work
