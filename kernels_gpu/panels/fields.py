"""Reads tiles of any panel (layouts: panels.py) as f32: for tensor cores, embeddings and dequantizing."""

import triton
import triton.language as tl

from gguf_run.kernels_gpu.panels.dots import book_value
from gguf_run.kernels_gpu.panels.units import exponent_half, half_pair


@triton.jit
def _scales(scale, d, at, at_d, f: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr):
    """Return scale and minimum of field f of units. at: numbers of the units; at_d: numbers of their d."""
    n_group: tl.constexpr = 1 if GROUP == 32 else (4 if BITS == 2 else 2)
    if SCALES == "f16":
        factor = tl.load(scale.to(tl.pointer_type(tl.float16)) + at).to(tl.float32)
        return factor, tl.zeros_like(factor)
    elif SCALES == "f16m":
        return half_pair(tl.load(scale.to(tl.pointer_type(tl.int32)) + at))
    elif SCALES == "e8m0":
        factor = exponent_half(tl.load(scale + at).to(tl.int32))
        return factor, tl.zeros_like(factor)
    elif SCALES == "k8":
        factor = tl.load(d.to(tl.pointer_type(tl.float16)) + at_d).to(tl.float32)
        small = tl.load(scale.to(tl.pointer_type(tl.int8)) + at * n_group + (0 if GROUP == 32 else f))
        return factor * small.to(tl.float32), tl.zeros_like(factor)
    else:
        factor, minimum = half_pair(tl.load(d.to(tl.pointer_type(tl.int32)) + at_d))
        if SCALES == "k4":
            pair = tl.load(scale + at * n_group + f).to(tl.int32)
            return factor * (pair & 15).to(tl.float32), -minimum * (pair >> 4).to(tl.float32)
        else:
            pair = tl.load(scale.to(tl.pointer_type(tl.uint16)) + at).to(tl.int32)
            return factor * (pair & 255).to(tl.float32), -minimum * (pair >> 8).to(tl.float32)


@triton.constexpr_function
def field_width(panel):
    """Weights of a field: a float panel's unit is one field."""
    return panel.unit if panel.bits >= 16 else 16


@triton.jit
def tile_field(w, rows, units, n_unit, f: tl.constexpr, PANEL: tl.constexpr):
    """Return field f of `units` int32[n] of `rows` int64[m], f32[m, n, field_width]. w: planes of the weights."""
    qs, high, scale, d = w
    BITS: tl.constexpr = PANEL.bits
    HIGH: tl.constexpr = PANEL.high
    SCALES: tl.constexpr = PANEL.scales
    BOOK: tl.constexpr = PANEL.book_words
    at = rows[:, None] * n_unit + units[None, :]
    if BITS >= 16:
        e = tl.arange(0, 128 // BITS)[None, None, :]
        element = at[:, :, None] * (128 // BITS) + e
        if SCALES == "F32":
            return tl.load(qs.to(tl.pointer_type(tl.float32)) + element)
        elif SCALES == "F16":
            return tl.load(qs.to(tl.pointer_type(tl.float16)) + element).to(tl.float32)
        else:
            word = tl.load(qs.to(tl.pointer_type(tl.uint16)) + element)
            return (word.to(tl.int32) << 16).to(tl.float32, bitcast=True)
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
        per: tl.constexpr = 4 if BITS == 2 else 8
        at_d = rows[:, None] * (n_unit // per) + units[None, :] // per
        factor, minimum = _scales(scale, d, at, at_d, f, BITS, PANEL.group, SCALES)
        value = factor[:, :, None] * (code - PANEL.offset).to(tl.float32)
        if SCALES == "f16m" or SCALES == "k4" or SCALES == "k6m":
            value += minimum[:, :, None]
        return value
