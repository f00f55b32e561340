"""Values that are the first columns of the keys (latent attention): the cache has no rows for them.

Keys are stored by columns: one load brings a column of 16 positions, as scores need it. Products with values need 16
columns of one position. So each span of keys becomes rows once, in scratch memory, for all query rows of a piece.
"""

import functools
from typing import Any

from gguf_run.formats.compiler.jit import njit
from gguf_run.kernels_cpu.attention.cache_types import FORMATS, format_id
from gguf_run.kernels_cpu.attention.float_tiles import VECTORS, value_tile
from gguf_run.kernels_cpu.attention.int_tiles import scale_columns
from gguf_run.kernels_cpu.attention.sizes import SPAN
from gguf_run.kernels_cpu.matmul.int_tile import decode_blocks, load_factors
from gguf_run.kernels_cpu.matmul.tile import load_floats
from gguf_run.kernels_cpu.panels.panels import BLOCK, ROWS, FloatPanel, PlainPanel
from gguf_run.kernels_cpu.vector.lowering import simd_kernel
from gguf_run.kernels_cpu.vector.simd import F32, I32, I64, Simd, Val

_ROW = 4 * VECTORS * ROWS  # bytes of a position in a part: the columns of a tile of values


def _columns(s: Simd, panel: PlainPanel, k: Val, b: Val) -> list[Val]:
    """Return the 32 columns of block b of 16 keys, f32, without scales of whole rows."""
    if isinstance(panel, FloatPanel):
        at = k + b * (BLOCK * panel.step_bytes)
        return [load_floats(s, panel, at + c * panel.step_bytes) for c in range(BLOCK)]
    at, zero, columns = k + b * panel.span_bytes, s.const(I64, 0), []
    factors = load_factors(s, panel, at, zero, ROWS)
    block = next(decode_blocks(s, panel, at, factors, zero, ROWS, zero, in_order=False))
    for c in range(BLOCK):
        u = (block.quant(c // 4).as_type(I32) >> 8 * (c % 4)) & 0xFF
        value = (u - panel.offset).to(F32)
        value = value * block.scales[0] if block.scales else value
        columns.append(value + block.minimums[0] if block.minimums else value)
    return columns


@simd_kernel
def _rows_of_keys(s: Simd, form: int, k: Val, k_group: Val, k_half: Val, n_half: Val, n_block: Val, out: Val) -> None:
    """Write the first columns of keys as f32[n_block * 32 / columns of a part][SPAN][columns of a part] at out.

    form: place of K's type in FORMATS.
    k, k_group, k_half: elements of the first group, the bytes from group to group, the bytes of 16 positions.
    n_half: how often 16 positions. n_block: blocks of 32 columns.
    """
    part = 64 if VECTORS == BLOCK // ROWS else SPAN * _ROW  # bytes from the first 16 columns of a block to the others

    def block(j: Val, b: Val) -> None:
        columns = _columns(s, FORMATS[form].panel, k + (j >> 1) * k_group + (j & 1) * k_half, b)
        to = out + b * (4 * SPAN * BLOCK) + j * (ROWS * _ROW)
        for h in range(BLOCK // ROWS):
            vectors = columns[ROWS * h : ROWS * h + ROWS]
            for _ in range(4):  # each round moves one bit of the number of a position from the vector to the lane
                pairs = zip(vectors[:8], vectors[8:], strict=True)
                vectors = [s.zip(x, y, first, 8) for x, y in pairs for first in (0, 8)]
            for p, vector in enumerate(vectors):
                s.store(vector, to + h * part + p * _ROW)

    s.each(n_half, lambda j: s.each(n_block, lambda b: block(j, b)))


@functools.cache
def latent_values(k_form: int) -> tuple[Any, Any]:
    """Return two kernels: one makes the rows of a span in Memory.p, the other is as that of attention.values."""
    panel, has_row_scales, f32 = FORMATS[k_form].panel, FORMATS[k_form].block is None, format_id("f32")
    column = ROWS * panel.element_bytes if isinstance(panel, FloatPanel) else 0
    block = 0 if isinstance(panel, FloatPanel) else panel.span_bytes

    @njit(inline="always")
    def rows_of_keys(a, m, k, n_seen):
        k_half = a.head_dim * column + a.n_wide // BLOCK * block
        n_half = (min(n_seen, SPAN) + ROWS - 1) // ROWS
        _rows_of_keys(k_form, k + a.k_at, a.k_group, k_half, n_half, a.wide // BLOCK, m.p)

    @njit(inline="always")
    def values(a, m, tile, r, k, next_k, n_seen):
        if has_row_scales:
            scale_columns(k_form, m.scores, tile.rows, k, a.k_group, n_seen)
        for d in range(0, a.wide, tile.width):
            v, sums = m.p + d * SPAN * 4, m.sums + (r * a.wide + d) * 4
            value_tile(f32, tile.few, m.scores, v, tile.width * 4, n_seen, v, sums, a.wide * 4)

    return rows_of_keys, values
