"""Reads tiles of any panel (layouts: panels.py) as f32: for tensor cores, embeddings and dequantizing."""

import triton
import triton.language as tl

from gguf_run.kernels_gpu.panels.dots import book_value
from gguf_run.kernels_gpu.panels.units import half_pair, load_floats, unit_factors


@triton.jit
def _factors(w, rows, units, n_unit, f: tl.constexpr, PANEL: tl.constexpr):
    """Return scale and minimum of field f of units, f32[m, n]. rows: int64[m, 1]; units: int32[1, n]."""
    if PANEL.group == 32:
        return unit_factors(w, rows, units, n_unit, PANEL)
    else:
        _qs, _high, scale, d = w
        n_field: tl.constexpr = PANEL.unit // 16
        at = (rows * n_unit + units) * n_field + f
        per: tl.constexpr = 256 // PANEL.unit  # units that share d
        at_d = rows * (n_unit // per) + units // per
        if PANEL.scales == "k8":
            factor = tl.load(d.to(tl.pointer_type(tl.float16)) + at_d).to(tl.float32)
            return factor * tl.load(scale.to(tl.pointer_type(tl.int8)) + at).to(tl.float32), tl.zeros_like(factor)
        else:
            factor, minimum = half_pair(tl.load(d.to(tl.pointer_type(tl.int32)) + at_d))
            pair = tl.load(scale + at).to(tl.int32)
            return factor * (pair & 15).to(tl.float32), -minimum * (pair >> 4).to(tl.float32)


@triton.constexpr_function
def field_width(panel):
    """Weights of a field: a float panel's unit is one field."""
    return panel.unit if panel.bits >= 16 else 16


@triton.jit
def tile_field(w, rows, units, n_unit, f: tl.constexpr, PANEL: tl.constexpr):
    """Return field f of `units` int32[n] of `rows` int64[m], f32[m, n, field_width]. w: planes of the weights."""
    qs, high, _scale, _d = w
    BITS: tl.constexpr = PANEL.bits
    HIGH: tl.constexpr = PANEL.high
    SCALES: tl.constexpr = PANEL.scales
    BOOK: tl.constexpr = PANEL.book_words
    at = rows[:, None] * n_unit + units[None, :]
    if BITS >= 16:
        e = tl.arange(0, 128 // BITS)[None, None, :]
        element = at[:, :, None] * (128 // BITS) + e
        return load_floats(qs, element, SCALES)
    else:
        b = tl.arange(0, 16)[None, None, :]
        if BITS == 8:
            plane = rows[:, None] * n_unit * 2 + f * n_unit + units[None, :]
            code = tl.load(qs.to(tl.pointer_type(tl.int8)) + plane[:, :, None] * 16 + b).to(tl.int32)
        else:
            code = (tl.load(qs + at[:, :, None] * 16 + b).to(tl.int32) >> (BITS * f)) & ((1 << BITS) - 1)
        if HIGH == 1 and BITS == 4:
            bit = tl.load(high + at[:, :, None] * 4 + b % 4).to(tl.int32) >> (4 * f + b // 4)
            code = code | (bit & 1) << 4
        elif HIGH == 1:
            bit = tl.load(high + at[:, :, None] * 8 + f // 2 * 4 + b % 4).to(tl.int32) >> (f % 2 * 4 + b // 4)
            code = code | (bit & 1) << 2
        elif HIGH == 2:
            bit = tl.load(high + at[:, :, None] * 8 + f * 4 + b % 4).to(tl.int32) >> (b // 4 * 2)
            code = code | (bit & 3) << 4
        if BOOK is not None:
            code = book_value(code, BOOK)
        factor, minimum = _factors(w, rows[:, None], units[None, :], n_unit, f, PANEL)
        value = factor[:, :, None] * (code - PANEL.offset).to(tl.float32)
        if SCALES == "f16m" or SCALES == "k4" or SCALES == "k6m":
            value += minimum[:, :, None]
        return value


@triton.jit(do_not_specialize=["n_row"])
def dequantize(
    w, ids, first, out, out_stride, n_row, n_in, n_unit,
    FACTOR: tl.constexpr, PANEL: tl.constexpr, N: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """out[i] = FACTOR * row ids[i] of the weights, or row first + i without ids; grid (n_row / N, n_unit / UNITS)."""
    E: tl.constexpr = field_width(PANEL)
    UNIT: tl.constexpr = PANEL.unit
    o = tl.program_id(0) * N + tl.arange(0, N)
    u = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    rows = tl.minimum(o, n_row - 1)
    rows = (first + rows if ids is None else tl.load(ids + rows)).to(tl.int64)
    units = tl.minimum(u, n_unit - 1)
    for f in tl.static_range(UNIT // E):
        field = tile_field(w, rows, units, n_unit, f, PANEL)
        column = u[None, :, None] * UNIT + f * E + tl.arange(0, E)[None, None, :]
        at = out + o[:, None, None].to(tl.int64) * out_stride + column
        tl.store(at, field if FACTOR == 1.0 else field * FACTOR, mask=(o[:, None, None] < n_row) & (column < n_in))
