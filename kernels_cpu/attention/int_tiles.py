"""The matrix products of attention over integers: K and V are read from panels, as stored (cache_types.py).

q.k is the matmul tile of weights. q is int8 in blocks of 32 columns; the rows of K are the rows of a panel.

For p.v, p is multiplied by the scale of each position (and block) and becomes 16-bit integers, anew for each span:

    out[r, d] += factor[r] * sum over positions of p[r, position] * (u[position, d] - offset)

A product takes two positions at once: l and l + 16 of a group. Their u are bytes 0 and 2, or 1 and 3, of a lane, made
16-bit numbers. Their p are side by side, because quantize_p packs two vectors of p into one.

form is the place of the type of K or V in FORMATS. The kernels do nothing if this type has no panel of integers, and
scale_columns does nothing if rows have no scale.
"""

import functools
import operator

from gguf_run.kernels_cpu.attention.cache_types import FORMATS, CacheFormat
from gguf_run.kernels_cpu.attention.sizes import P_BYTES, P_FACTOR, P_MINIMUM, P_START, SPAN
from gguf_run.kernels_cpu.matmul.int_tile import int_tile, load_quants
from gguf_run.kernels_cpu.panels.panels import FLOAT8_FACTOR, ROWS, FloatPanel, IntPanel
from gguf_run.kernels_cpu.vector import isa
from gguf_run.kernels_cpu.vector.lowering import simd_kernel
from gguf_run.kernels_cpu.vector.simd import F16, F32, I16, I32, I64, Simd, Val
from gguf_run.models.kv_cache import GROUP

INT_ROWS = 4 if isa.current().lanes == 16 else 2  # query rows of a tile, of 2 vectors; divides FEW and TILE
_VECTORS = SPAN // ROWS
_LARGEST = 32767.0  # the largest p as an integer


@simd_kernel(apart=True)
def int_score_tile(s: Simd, form: int, q: Val, q_row: Val, k: Val, n_blocks: Val, zeros: Val, scores: Val) -> None:
    """scores[r, j] = q[r] . k[j] for INT_ROWS rows r and the 32 positions j of a group, without scales of whole rows.

    q, q_row: rows of n_blocks activation blocks (panels/panels.py), and the bytes from row to row.
    k: the elements of a group.
    zeros: f32[16].
    scores: f32[rows][SPAN].
    """
    panel = FORMATS[form].panel
    if not isinstance(panel, IntPanel):
        return
    xs = [q + q_row * r for r in range(INT_ROWS)]
    ws = [k, k + n_blocks * panel.span_bytes]
    places = [(zeros, scores + (r * SPAN + j * ROWS) * 4) for r in range(INT_ROWS) for j in range(2)]
    int_tile(s, panel, ws, n_blocks, xs, places)


def _numbers(s: Simd, form: CacheFormat, groups: list[Val], at: Val | int) -> list[Val]:
    """Load the f16 numbers of SPAN positions, `at` bytes from the start of two groups, as f32 vectors."""
    panel = form.panel
    factor = FLOAT8_FACTOR[panel.name] if isinstance(panel, FloatPanel) else 1.0
    loaded = [s.load(group + at + 32 * h, F16, ROWS).to(F32) for group in groups for h in (0, 1)]
    return loaded if factor == 1 else [value * factor for value in loaded]


def _two_groups(s: Simd, first: Val, group_bytes: Val, n_seen: Val) -> list[Val]:
    """Addresses of two groups. If no position of the second is seen, there may be no memory: the first is repeated."""
    return [first, first + s.select(n_seen.compare(">", GROUP), group_bytes, s.const(I64, 0))]


@simd_kernel
def scale_columns(s: Simd, form: int, scores: Val, n_rows: Val, group: Val, group_bytes: Val, n_seen: Val) -> None:
    """Multiply scores, f32[n_rows][SPAN], by the scales of the positions in two groups."""
    type = FORMATS[form]
    if type.block is not None:
        return
    scales = _numbers(s, type, _two_groups(s, group, group_bytes, n_seen), 0)

    def body(r: Val) -> None:
        for i, scale in enumerate(scales):
            at = scores + r * (4 * SPAN) + 64 * i
            s.store(s.load(at, F32, ROWS) * scale, at)

    s.each(n_rows, body)


@simd_kernel
def quantize_p(
    s: Simd, form: int, p: Val, n_rows: Val, group: Val, group_bytes: Val, n_seen: Val, n_blocks: Val, out: Val
) -> None:
    """Multiply p of each row by the scales of each block of V, and make integers of it: see P_FACTOR.

    p: f32[n_rows][SPAN], not negative.
    group, group_bytes: the first of two groups of V, and the bytes from group to group.
    n_seen: positions that are seen.
    n_blocks: blocks with scales of their own.
    out: [n_rows][n_blocks] of P_BYTES.
    """
    type = FORMATS[form]
    panel = type.panel
    if not isinstance(panel, IntPanel):
        return
    groups = _two_groups(s, group, group_bytes, n_seen)
    magic = s.const(F32, 12582912.0, ROWS)  # as in Simd.rint
    zero = s.const(F32, 0.0)

    def block(b: Val) -> None:
        at = b * (2 * GROUP * type.n_numbers)
        scales = _numbers(s, type, groups, at)
        minimums = _numbers(s, type, groups, at + 2 * GROUP) if panel.has_minimum else []

        def row(r: Val) -> None:
            to = out + (r * n_blocks + b) * P_BYTES
            values = [s.load(p + r * (4 * SPAN) + 64 * i, F32, ROWS) for i in range(_VECTORS)]
            scaled = [value * scale for value, scale in zip(values, scales, strict=True)]
            most = s.fold(functools.reduce(s.maximum, map(s.absolute, scaled)), s.maximum)
            factor = s.splat(s.select(most.compare(">", 1e-30), s.const(F32, _LARGEST) / most, zero), ROWS)
            words = [s.fma(value, factor, magic).as_type(I32) for value in scaled]
            for g in (0, 1):
                s.store((words[2 * g] & 0xFFFF) | (words[2 * g + 1] << 16), to + 64 * g)
            s.store(most * (1 / _LARGEST), to + P_FACTOR)
            if panel.offset:
                total = s.sum(functools.reduce(operator.add, [word - magic.as_type(I32) for word in words]))
                s.store(total * -panel.offset, to + P_START)
            if minimums:
                parts = [value * minimum for value, minimum in zip(values, minimums, strict=True)]
                s.store(s.sum(functools.reduce(operator.add, parts)), to + P_MINIMUM)

        s.each(n_rows, row)

    s.each(n_blocks, block)


@simd_kernel(apart=True)
def int_value_tile(
    s: Simd, form: int, p: Val, p_row: Val, v: Val, group_bytes: Val, n_groups: Val, sums: Val, sums_row: Val
) -> None:
    """sums[r, d] += sum over the positions of n_groups groups of p[r] * v[d], for INT_ROWS rows r and 32 columns d.

    p, p_row: what quantize_p made for the block of the columns, and the bytes from row to row.
    v, group_bytes: the planes of the columns in the first group, and the bytes from group to group.
    sums, sums_row: f32, and the bytes from row to row.
    """
    panel = FORMATS[form].panel
    if not isinstance(panel, IntPanel):
        return
    ps = [p + p_row * r for r in range(INT_ROWS)]
    zero = s.const(I32, 0, ROWS)
    starts = [s.load(at + P_START, I32, splat=ROWS) if panel.offset else zero for at in ps]

    def group(g: Val, acc: list[Val]) -> list[Val]:
        vectors = [load_quants(s, panel, v + g * group_bytes + 64 * panel.bits * j) for j in (0, 1)]
        acc = list(acc)
        for i in range(GROUP // 4):
            words = [quant(i).as_type(I16) for quant in vectors]
            for odd in (0, 1):
                us = [word >> 8 if odd else word & 0xFF for word in words]
                for r, at in enumerate(ps):
                    pair = s.load(at + g * 64 + 4 * (2 * i + odd), I32, splat=ROWS).as_type(I16)
                    for j in (0, 1):
                        acc[2 * r + j] = s.add_pairs(acc[2 * r + j], us[j], pair)
        return acc

    totals = s.loop(n_groups, [start for start in starts for _ in (0, 1)], group)
    for r, at in enumerate(ps):
        factor = s.load(at + P_FACTOR, F32, splat=ROWS)
        for j in (0, 1):
            place = sums + sums_row * r + 64 * j
            old = s.load(place, F32, ROWS)
            if panel.has_minimum:
                old = old + s.load(at + P_MINIMUM, F32, splat=ROWS)
            s.store(s.fma(totals[2 * r + j].to(F32), factor, old), place)
