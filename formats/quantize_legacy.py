"""Quantizers of Q4_0 Q4_1 Q5_0 Q5_1 Q8_0, byte for byte ggml's: blocks of 32 weights with a scale, some with a minimum.

Layouts: unpack_legacy.py. Without importance weights the largest weight (or largest and smallest) sets the scale; with
them a search for the scale does (quantize_lanes.py). Q8_0 has no use for them.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.jit import njit, specialize
from gguf_run.formats.quantize_lanes import (
    GROUP,
    LANES,
    fit_scale,
    fit_scale_and_minimum,
    load_tile,
    load_weights,
    sums_of_squares,
)
from gguf_run.formats.scalars import c_int, f32_of, half_bits, put_u16, roundf
from gguf_run.formats.types import type_by_name

# Placeholders: specialize() gives the loop below a type's own values for these names.
TYPE_SIZE = BITS = 0
HAS_MINIMUM = WEIGHTED = False
_0, _1 = np.float32(0), np.float32(1)


@njit
def _span_scale(xs: Any, n_max: int, q: Any, d: Any) -> None:
    """The weight of largest magnitude becomes q = 0: d f32[LANES], q u8[32, LANES], weight = d * (q - n_max)."""
    top, inverse = np.zeros((2, LANES), np.float32)
    for i in range(GROUP):
        for k in range(LANES):
            top[k] = xs[i, k] if abs(xs[i, k]) > abs(top[k]) else top[k]
    for k in range(LANES):
        d[k] = top[k] / np.float32(-n_max)
        inverse[k] = _1 / d[k] if d[k] != _0 else _0
    half_up, high = np.float32(n_max + 0.5), np.int32(2 * n_max - 1)
    for i in range(GROUP):
        for k in range(LANES):
            q[i, k] = min(high, c_int(xs[i, k] * inverse[k] + half_up))


@njit
def _span_scale_and_minimum(xs: Any, n_max: int, q: Any, d: Any, m: Any) -> None:
    """The smallest weight becomes q = 0, the largest q = n_max: d, m f32[LANES], weight = d * q + m."""
    top, inverse = np.empty((2, LANES), np.float32)
    for k in range(LANES):
        m[k] = top[k] = xs[0, k]
    for i in range(1, GROUP):
        for k in range(LANES):
            m[k] = xs[i, k] if xs[i, k] < m[k] else m[k]
            top[k] = xs[i, k] if xs[i, k] > top[k] else top[k]
    for k in range(LANES):
        d[k] = (top[k] - m[k]) / np.float32(n_max)
        inverse[k] = _1 / d[k] if d[k] != _0 else _0
    for i in range(GROUP):
        for k in range(LANES):
            q[i, k] = min(np.int32(n_max), c_int((xs[i, k] - m[k]) * inverse[k] + np.float32(0.5)))


def _blocks(x: Any, n: int, importance: Any, out: Any) -> None:
    """Rows of n weights x f32[:] -> blocks out u8[:]: d f16 | m f16 if any | qh u32, fifth bits, if any | qs u8[16]."""
    xs, ws = np.empty((GROUP, LANES), np.float32), np.empty((GROUP, LANES), np.float32)
    q = np.empty((GROUP, LANES), np.uint8)
    d, m = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    n_max = (1 << BITS) - 1 if HAS_MINIMUM else 1 << BITS - 1
    if WEIGHTED:
        sigma2 = sums_of_squares(x, n) / np.float32(n)
    for first in range(0, len(x) // GROUP, LANES):
        load_tile(x, first, xs)
        if WEIGHTED:
            load_weights(x, first, xs, importance, sigma2, ws)
            if HAS_MINIMUM:
                fit_scale_and_minimum(xs, ws, n_max, q, d, m)
            else:
                fit_scale(xs, ws, n_max, q, d)
        elif HAS_MINIMUM:
            _span_scale_and_minimum(xs, n_max, q, d, m)
        else:
            _span_scale(xs, n_max, q, d)
        for k in range(min(LANES, len(x) // GROUP - first)):
            block = out[(first + k) * TYPE_SIZE :][:TYPE_SIZE]
            put_u16(block, 0, half_bits(d[k]))
            if HAS_MINIMUM:
                put_u16(block, 2, half_bits(m[k]))
            if BITS == 5:
                qh: Any = 0
                for i in range(GROUP):
                    qh |= np.int64(q[i, k] >> 4) << i
                put_u16(block, TYPE_SIZE - 20, qh)
                put_u16(block, TYPE_SIZE - 18, qh >> 16)
            for i in range(16):
                block[TYPE_SIZE - 16 + i] = q[i, k] & 15 | (q[16 + i, k] & 15) << 4


@njit
def _q8_0(x: Any, n: int, importance: Any, out: Any) -> None:
    """Blocks d f16 | qs i8[32]: d = the largest magnitude / 127."""
    bits = x.view(np.int32)
    for b in range(len(x) // GROUP):
        block = out[b * 34 :][:34]
        top = np.int32(0)  # as integers, since a maximum of floats would not be vectorized
        for i in range(b * GROUP, b * GROUP + GROUP):
            top = max(top, np.int32(bits[i] & 0x7FFFFFFF))
        d = f32_of(top) / np.float32(127)
        inverse = _1 / d if d != _0 else _0
        put_u16(block, 0, half_bits(d))
        for i in range(GROUP):
            block[2 + i] = roundf(x[b * GROUP + i] * inverse)


Quantizer = Callable[[NDArray[np.float32], int, NDArray[np.float32], NDArray[np.uint8]], None]


def _quantizer(name: str, bits: int, has_minimum: bool) -> Quantizer:
    """Two kernels, with and without weights: few need both, and each takes seconds to compile."""
    plain, weighted = (
        specialize(
            _blocks,
            f"{name}_{weighted}",
            TYPE_SIZE=type_by_name(name).type_size,
            BITS=bits,
            HAS_MINIMUM=has_minimum,
            WEIGHTED=weighted,
        )
        for weighted in (False, True)
    )
    return lambda x, n, importance, out: (weighted if len(importance) else plain)(x, n, importance, out)


LEGACY_QUANTIZERS: Mapping[str, Quantizer] = MappingProxyType(
    {
        "Q4_0": _quantizer("Q4_0", 4, False),
        "Q4_1": _quantizer("Q4_1", 4, True),
        "Q5_0": _quantizer("Q5_0", 5, False),
        "Q5_1": _quantizer("Q5_1", 5, True),
        "Q8_0": _q8_0,
    }
)
