"""Quantizers of IQ4_NL IQ4_XS TQ1_0 TQ2_0 and F32 F16 BF16, byte for byte as ggml's reference.

formats/blocks/unpack_small.py draws the layouts. Only IQ4_NL and IQ4_XS use importance weights.
"""

from itertools import pairwise
from typing import Any

import numpy as np

from gguf_run.formats.blocks.scalars import half_bits
from gguf_run.formats.blocks.types import CODEBOOKS
from gguf_run.formats.compiler.jit import njit
from gguf_run.formats.quantizers.encode import Quantizer, block_quantizers, roundf
from gguf_run.formats.quantizers.lanes import (
    f32,
    offset,
    scratch_f32,
    to_float,
    to_int,
    where,
)
from gguf_run.formats.quantizers.pack import half, put, put_crumbs, put_half
from gguf_run.formats.quantizers.search import EPS, largest, quant, sum_of_squares, weigh

_F = np.float32
_IQ4 = tuple(_F(v) for v in CODEBOOKS["iq4_nl"])
_LOWEST, _HIGHEST = _IQ4[0], _IQ4[-1]
# (middle between a value and the next one, step to the next one). The middle belongs to the next value.
_IQ4_STEPS = tuple((_F(a + b) / 2, b - a) for a, b in pairwise(_IQ4))


@njit(forceinline=True)
def _nearest_iq4(v: Any) -> Any:
    """The value of the codebook that is nearest to v; the highest value for NaN."""
    value = f32(_HIGHEST)
    for middle, step in _IQ4_STEPS:
        value = where(v < middle, value - step, value)
    return value


@njit(forceinline=True)
def _iq4_code(v: Any) -> Any:
    """The index of the value of the codebook that is nearest to v, as I32."""
    code = to_int(f32(15))
    for middle, _ in _IQ4_STEPS:
        code = where(v < middle, code - 1, code)
    return code


@njit(forceinline=True)
def _iq4_sums(x: Any, w: Any, inverse: Any) -> Any:
    """Return sum(w * q * x) and sum(w * q * q). Each q is the codebook's value nearest to inverse * x."""
    sum_qx, sum_q2 = f32(0), f32(0)
    for i in range(32):
        value = _nearest_iq4(inverse * x[i])
        wq = w[i] * value
        sum_qx += wq * x[i]
        sum_q2 += wq * value
    return sum_qx, sum_q2


@njit(forceinline=True)
def _iq4_scale(x: Any, w: Any) -> Any:
    """The scale d with the least sum of w * (x - d * q)**2 over 32 weights, of 16 trials.

    A trial chooses q by a scale of its own. With the first scale the weight of largest magnitude becomes 127, with the
    others -127 + i for i in -7..7.
    """
    peak, magnitude = largest(x, 32)
    sum_qx, sum_q2 = _iq4_sums(x, w, 1 / (peak * _F(-1) / _LOWEST))
    d = where(sum_q2 > 0, sum_qx / sum_q2, 0)
    best = d * sum_qx
    for k in range(-7, 8):
        sum_qx, sum_q2 = _iq4_sums(x, w, (_F(k) + _LOWEST) / peak)
        better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2)
        d = where(better, sum_qx / sum_q2, d)
        best = where(better, d * sum_qx, best)
    return where(magnitude < EPS, 0, d)


@njit(forceinline=True)
def _iq4_weights(x: Any, importance: Any, w: Any, sigma2: Any, weighted: Any) -> None:
    """w = how much the errors of 32 weights count."""
    if weighted:
        weigh(x, importance, w, 32, sigma2)
    else:
        for i in range(32):
            w[i] = x[i] * x[i]


@njit(forceinline=True)
def _put_iq4(block: Any, at: Any, x: Any, inverse: Any) -> None:
    for i in range(16):
        put(block, at + i, _iq4_code(inverse * x[i]) | _iq4_code(inverse * x[16 + i]) << 4)


@njit(inline="always")
def _encode_iq4_nl(x: Any, importance: Any, q: Any, block: Any, weighted: Any) -> None:
    _iq4_weights(x, importance, q, sum_of_squares(x, 32) * _F(2 / 32), weighted)
    d = _iq4_scale(x, q)
    put_half(block, 0, half(d))
    _put_iq4(block, 2, x, where(d != 0, 1 / d, 0))


@njit(inline="always")
def _encode_iq4_xs(x: Any, importance: Any, q: Any, block: Any, weighted: Any) -> None:
    scales = scratch_f32(8)
    sigma2 = sum_of_squares(x, 256) * _F(2 / 256)
    for g in range(8):
        _iq4_weights(offset(x, 32 * g), offset(importance, 32 * g), q, sigma2, weighted)
        scales[g] = _iq4_scale(offset(x, 32 * g), q)
    d = largest(scales, 8)[0] / _F(-32)
    inverse = where(d != 0, 1 / d, 0)
    put_half(block, 0, half(d))
    scales_h, scales_l = to_int(f32(0)), to_int(f32(0))
    for g in range(8):
        code = quant(inverse * scales[g], _F(-32), _F(31))
        scale = d * code
        _put_iq4(block, 8 + 16 * g, offset(x, 32 * g), where(scale != 0, 1 / scale, 0))
        bits = to_int(code) + 32
        scales_l = scales_l | (bits & 15) << 4 * g
        scales_h = scales_h | bits >> 4 << 2 * g
    put_half(block, 2, scales_h)
    put_half(block, 4, scales_l)
    put_half(block, 6, scales_l >> 16)


@njit(forceinline=True)
def _trits(x: Any, q: Any) -> Any:
    """q = 0, 1 or 2 for the 256 weights: nearest to -d, 0 or d. Returns d, the largest magnitude."""
    d = largest(x, 256)[1]
    inverse = where(d != 0, 1 / d, 0)
    for i in range(256):
        q[i] = to_float(roundf(x[i] * inverse) + 1)
    return d


@njit(forceinline=True)
def _put_digits(block: Any, at: Any, q: Any, n: Any, n_digits: Any) -> None:
    """n bytes from `at` on, each of n_digits digits in base three: digit j of byte i is q[n * j + i].

    Five digits, the fifth 0 if n_digits is 4, are a number t below 243. Its byte is 256 / 243 * t, rounded up.
    """
    for i in range(n):
        t = to_int(q[i])
        for j in range(1, n_digits):
            t = t * 3 + to_int(q[n * j + i])
        if n_digits == 4:
            t = t * 3
        put(block, at + i, t + ((13 * t + 242) * 135 >> 15))  # t + (13 * t + 242) / 243, for t < 243


@njit(inline="always")
def _encode_tq1_0(x: Any, importance: Any, q: Any, block: Any, weighted: Any) -> None:
    d = _trits(x, q)
    _put_digits(block, 0, q, 32, 5)
    _put_digits(block, 32, offset(q, 160), 16, 5)
    _put_digits(block, 48, offset(q, 240), 4, 4)
    put_half(block, 52, half(d))


@njit(inline="always")
def _encode_tq2_0(x: Any, importance: Any, q: Any, block: Any, weighted: Any) -> None:
    d = _trits(x, q)
    put_crumbs(block, 0, 32, q, 0, 0)
    put_crumbs(block, 32, 32, q, 128, 0)
    put_half(block, 64, half(d))


@njit
def _f16(x: Any, n: int, importance: Any, out: Any) -> None:
    halves = out.view(np.uint16)
    for i in range(len(x)):
        halves[i] = half_bits(x[i])


@njit
def _bf16(x: Any, n: int, importance: Any, out: Any) -> None:
    """Store the upper half of each f32, rounded to nearest, halves to even."""
    bits, halves = x.view(np.uint32), out.view(np.uint16)
    for i in range(len(x)):
        halves[i] = (bits[i] + 0x7FFF + (bits[i] >> 16 & 1)) >> 16


def _f32(x: Any, n: int, importance: Any, out: Any) -> None:
    out[:] = x.view(np.uint8)


SMALL_QUANTIZERS: dict[str, Quantizer] = block_quantizers(
    IQ4_NL=_encode_iq4_nl, IQ4_XS=_encode_iq4_xs, TQ1_0=_encode_tq1_0, TQ2_0=_encode_tq2_0
) | {"F32": _f32, "F16": _f16, "BF16": _bf16}
