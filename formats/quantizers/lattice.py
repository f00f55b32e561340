"""The grid that weights were trained for: scales and codes from which numbers of F16 or BF16 come back bit for bit.

A checkpoint that was trained for a type holds the weights d * q (+ m), rounded to the numbers of the checkpoint. ggml's
quantizers take d from the largest of these rounded numbers alone, and can move codes.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.codes import Codes, pack
from gguf_run.formats.blocks.types import TensorType
from gguf_run.formats.blocks.unpack import INTEGER_FORMS
from gguf_run.formats.compiler.jit import njit

LATTICES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # types whose scales are half floats without a shared factor
_GREATEST = 65504.0  # half float


@njit(forceinline=True)
def _unit(x: Any, bits: Any, least: Any) -> Any:
    """The distance of neighbouring numbers near x, of a kind with so many bits and the least number 2**least."""
    exponent = (np.float64(x).view(np.int64) >> 52 & 0x7FF) - 1022 - bits
    return np.int64((max(exponent, least) + 1023) << 52).view(np.float64)


@njit(forceinline=True)
def _nearest(x: Any, bits: Any, least: Any) -> Any:
    """The number of that kind that is nearest to the f64 x, halves to even."""
    shift = 1.5 * 2.0**52 * _unit(x, bits, least)  # a sum with it has no bits below the unit
    return np.float64(np.float64(x + shift) - shift)


@njit
def _fit(y: Any, below: Any, above: Any, d: Any, q_min: Any, q_max: Any, q: Any) -> Any:
    """Fill q with the codes of y f64[:] for a step near d. Return the middle of the steps that all weights allow.

    below, above: how far rounding can have moved each weight, up and down. NaN: there is no step.
    """
    low, high = -np.inf, np.inf
    for i in range(len(y)):
        v = min(max(y[i] / d, np.float64(q_min)), np.float64(q_max)) if d != 0 else 0.0
        v = np.float64(np.float64(v + 1.5 * 2.0**52) - 1.5 * 2.0**52)
        q[i] = np.int64(v)
        if v != 0:
            a, b = (y[i] - below[i]) / v, (y[i] + above[i]) / v
            low, high = max(low, min(a, b)), min(high, max(a, b))
    return 0.5 * (low + high) if low <= high else np.nan


@njit
def _is_fit(w: Any, q: Any, d: Any, m: Any, bits: Any, least: Any) -> Any:
    """Whether d * q + m gives all weights w f32[:] back."""
    good = abs(d) <= _GREATEST
    for i in range(len(w)):
        good = good and _nearest(np.float64(np.float32(d * q[i] + m)), bits, least) == np.float64(w[i])
    return good


@njit
def _recover(
    x: Any, bits: Any, least: Any, q_min: Any, q_max: Any, code: Any, scale: Any, minimum: Any, fits: Any
) -> None:
    """x f32[n, 32]. Fills code i8[n, 32], scale f32[n], minimum f32[n] or f32[0], fits bool[n]."""
    y, below, above = np.empty(x.shape[1]), np.empty(x.shape[1]), np.empty(x.shape[1])
    first = min(-q_min, 127) if q_min < 0 else q_max  # the greatest code of ggml's, which never uses -128
    for b in range(len(x)):
        w, q = x[b], code[b]
        m = np.float64(w.min()) if len(minimum) else 0.0
        top = 0.0
        for i in range(len(w)):
            y[i], v = w[i] - m, np.float64(w[i])
            # Neighbours of a power of two are nearer on the side of zero.
            outer, inner = 0.5 * _unit(v, bits, least), 0.5 * _unit(v * (1 - 2.0**-40), bits, least)
            below[i], above[i] = (inner, outer) if v > 0 else (outer, inner)
            top = y[i] if abs(y[i]) > abs(top) else top
        fits[b] = False
        peak = first if abs(top) < np.inf and m == _nearest(m, 11, -24) else 0
        while peak > 0 and not fits[b]:
            d = top / -peak if peak > q_max else abs(top) / peak
            middle = _fit(y, below, above, d, q_min, q_max, q)
            near = _nearest(d, 11, -24)
            for step in (near if near != 0 else d * 0.0, _nearest(middle, 11, -24)):
                if not fits[b] and _is_fit(w, q, step, m, bits, least):
                    scale[b], fits[b] = step, True
            peak -= 1
        if not fits[b]:
            q[:], scale[b] = 0, 0
        if len(minimum):
            minimum[b] = m if fits[b] else 0


def recover(x: NDArray[np.float32], type: TensorType) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return blocks, uint8[n_rows, n / 32, type_size], and which of them give the weights x f32[n_rows, n] back.

    type: one of LATTICES. Rounded to the coarsest of BF16, F16 and F32 that holds all of x, the weights of such a block
    are x, except that a zero may lose its sign. The others are zeros.
    The largest weight less m is tried as every code, from the largest on, which ggml gives it. m is the least weight.
    """
    form = INTEGER_FORMS[type.name]
    rows = np.ascontiguousarray(x).reshape(-1, type.block_size)
    with np.errstate(all="ignore"):
        bits, least = 24, -149
        if (rows.view(np.uint32) & 0xFFFF == 0).all():
            bits, least = 8, -133
        elif (rows.astype(np.float16) == rows).all():
            bits, least = 11, -24
    code, fits = np.empty(rows.shape, np.int8), np.empty(len(rows), np.bool_)
    scale, minimum = np.empty(len(rows), np.float32), np.empty(len(rows) * form.has_minimum, np.float32)
    _recover(rows, bits, least, form.q_min, form.q_max, code, scale, minimum, fits)
    n_rows, n_blocks = len(x), x.shape[1] // type.block_size
    factor = np.ones((n_rows, n_blocks, 2), np.float32)
    blocks = pack(Codes(type, code.reshape(x.shape), scale.reshape(n_rows, -1), minimum.reshape(n_rows, -1), factor))
    return blocks.reshape(n_rows, n_blocks, -1), fits.reshape(n_rows, n_blocks)
