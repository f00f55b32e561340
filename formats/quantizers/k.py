"""Quantizers of the K-quants, byte for byte as ggml's reference. formats/blocks/unpack_k.py draws the layouts.

Each lane (see lanes.py) works on a block of its own. The reference builds (libgguf 0.2.2, ggml-base of the prebuilt
llama.cpp) have no fused multiply-adds and agree with each other in every byte.
"""

from typing import Any

import numpy as np

from gguf_run.formats.compiler.jit import njit
from gguf_run.formats.quantizers.encode import block_quantizers
from gguf_run.formats.quantizers.lanes import f32, fabs, offset, scratch_f32, sqrt, to_float, to_int, where
from gguf_run.formats.quantizers.pack import (
    half,
    half_to_f32,
    put,
    put_bits,
    put_crumbs,
    put_half,
    put_nibbles,
    put_scales,
    put_scales_and_minimums,
)
from gguf_run.formats.quantizers.search import (
    EPS,
    largest,
    nearest,
    quant,
    search_min,
    search_positive,
    search_signed,
    search_signed_3bit,
    sum_of_squares,
    weigh,
)

_F = np.float32
_0, _3, _4, _15, _31, _32, _63, _127, _128, _255, _256 = (_F(n) for n in (0, 3, 4, 15, 31, 32, 63, 127, 128, 255, 256))


@njit(forceinline=True)
def _requantize(x: Any, q: Any, n: Any, scale: Any, minimum: Any, lowest: Any, highest: Any) -> None:
    """q = the quants for the scale and the minimum as stored, minus `lowest`. If the scale is 0, q stays as it is."""
    for i in range(n):
        q[i] = where(scale == 0, q[i], quant((x[i] + minimum) / scale, lowest, highest) - lowest)


@njit(forceinline=True)
def _share(values: Any, codes: Any, n: Any, top: Any) -> Any:
    """codes = values / unit, limited to 0..top; returns unit, which is the largest value / top."""
    peak = f32(0)
    for j in range(n):
        peak = where(values[j] > peak, values[j], peak)
    inverse = where(peak > 0, top / peak, 0)
    for j in range(n):
        code = to_float(to_int(nearest(inverse * values[j])) & 255)
        codes[j] = where(code < top, code, top)
    return peak / top


@njit(forceinline=True)
def _as_stored(codes: Any, min_codes: Any, top: Any, limit: Any) -> None:
    """Make the codes what a reader of the block will see.

    In about 1 of 10**4 blocks, ggml's weighted search finds codes above `top`. Q5_K limits them. In Q2_K and Q4_K their
    high bits spill into the next field.
    """
    if top == _15:
        for j in range(16):
            both = (to_int(codes[j]) | to_int(min_codes[j]) << 4) & 255
            codes[j], min_codes[j] = to_float(both & 15), to_float(both >> 4)
    else:
        for values in (codes, min_codes):
            for j in range(4):
                a, b = values[j], values[4 + j]
                a, b = to_int(where(a < limit, a, limit)), to_int(where(b < limit, b, limit))
                a = (a | b >> 4 << 6) & 255
                values[j], values[4 + j] = to_float(a & 63), to_float((b & 15) | a >> 6 << 4)


@njit(inline="always")
def _encode_min(x: Any, importance: Any, q: Any, codes: Any, min_codes: Any, weighted: Any, form: Any) -> Any:
    """Quantize to a type with minimums: fills q, codes (of scales) and min_codes. Returns the f16 bits of d and dmin.

    form: a row like _Q2_K, below.
    """
    group, nmax, top, limit, first, step, n_step, absolute = form
    w, scales, minimums, sums = scratch_f32(32), scratch_f32(16), scratch_f32(16), scratch_f32(16)
    n = 256 // group
    sigma2 = sum_of_squares(x, 256)
    sigma2 = (sigma2 if absolute else 2 * sigma2) / _256
    if weighted:
        first, step, n_step, absolute = _F(-0.9), _F(0.05), 36, False
    for j in range(n):
        xj = offset(x, j * group)
        if weighted:
            sums[j] = weigh(xj, offset(importance, j * group), w, group, sigma2)
        else:
            mean = f32(0)
            if not absolute:
                mean = sqrt(sum_of_squares(xj, group) / _F(group))
            for i in range(group):
                w[i] = mean + fabs(xj[i])
        qj = offset(q, j * group)
        scales[j], minimums[j] = search_min(xj, w, qj, group, nmax, first, step, n_step, absolute)
    if weighted:
        d = search_positive(scales, sums, codes, n, top)
        dmin = search_positive(minimums, sums, min_codes, n, top)
        _as_stored(codes, min_codes, top, limit)
    else:
        d = _share(scales, codes, n, top)
        dmin = _share(minimums, min_codes, n, top)
    d, dmin = half(d), half(dmin)
    for j in range(n):
        scale, minimum = half_to_f32(d) * codes[j], half_to_f32(dmin) * min_codes[j]
        _requantize(offset(x, j * group), offset(q, j * group), group, scale, minimum, _0, nmax)
    return d, dmin


# weights of a group, greatest quant, greatest scale code, limit of codes, search_min's first, step, n_step, absolute
_Q2_K = (16, _3, _15, _255, _F(-0.5), _F(0.1), 15, True)
_Q4_K = (32, _15, _63, _255, _F(-1.0), _F(0.1), 20, False)
_Q5_K = (32, _31, _63, _63, _F(-0.5), _F(0.1), 15, False)


@njit(inline="always")
def _encode_q2_k(x: Any, importance: Any, q: Any, block: Any, weighted: Any) -> None:
    codes, min_codes = scratch_f32(16), scratch_f32(16)
    d, dmin = _encode_min(x, importance, q, codes, min_codes, weighted, _Q2_K)
    for j in range(16):
        put(block, j, to_int(codes[j]) | to_int(min_codes[j]) << 4)
    put_crumbs(block, 16, 32, q, 0, 0)
    put_crumbs(block, 48, 32, q, 128, 0)
    put_half(block, 80, d)
    put_half(block, 82, dmin)


@njit(inline="always")
def _encode_nibbles(x: Any, importance: Any, q: Any, block: Any, weighted: Any, form: Any, at: Any) -> None:
    """Q4_K; and Q5_K without its fifth bits. at: the byte where the nibbles begin."""
    codes, min_codes = scratch_f32(16), scratch_f32(16)
    d, dmin = _encode_min(x, importance, q, codes, min_codes, weighted, form)
    put_half(block, 0, d)
    put_half(block, 2, dmin)
    put_scales_and_minimums(block, 4, codes, min_codes)
    for c in range(4):
        put_nibbles(block, at + 32 * c, 32, q, 64 * c)


@njit(inline="always")
def _encode_q4_k(x: Any, importance: Any, q: Any, block: Any, weighted: Any) -> None:
    _encode_nibbles(x, importance, q, block, weighted, _Q4_K, 16)


@njit(inline="always")
def _encode_q5_k(x: Any, importance: Any, q: Any, block: Any, weighted: Any) -> None:
    _encode_nibbles(x, importance, q, block, weighted, _Q5_K, 48)
    put_bits(block, 16, q, 4)


@njit(inline="always")
def _encode_q3_k(x: Any, importance: Any, q: Any, block: Any, weighted: Any) -> None:
    w, scales, codes, sums = scratch_f32(16), scratch_f32(16), scratch_f32(16), scratch_f32(16)
    sigma2 = 2 * sum_of_squares(x, 256) / _256
    for j in range(16):
        xj, qj = offset(x, 16 * j), offset(q, 16 * j)
        if weighted:
            sums[j] = weigh(xj, offset(importance, 16 * j), w, 16, sigma2)
            scales[j] = search_signed(xj, w, qj, 16, _4)
        else:
            for i in range(16):
                w[i] = xj[i] * xj[i]
            scales[j] = search_signed_3bit(xj, w, qj, 16, _4)
    if weighted:
        d = half(search_signed(scales, sums, codes, 16, _32))
    else:
        peak, _ = largest(scales, 16)
        inverse = -_32 / peak
        for j in range(16):
            code = to_int(nearest(inverse * scales[j])) << 24 >> 24  # ggml makes it an int8 before it limits it
            codes[j] = where(peak == 0, 0, quant(to_float(code), -_32, _31) + _32)
        d = half(where(peak == 0, 0, 1 / inverse))
    for j in range(16):
        _requantize(offset(x, 16 * j), offset(q, 16 * j), 16, half_to_f32(d) * (codes[j] - _32), f32(0), -_4, _3)
    put_bits(block, 0, q, 2)
    put_crumbs(block, 32, 32, q, 0, 0)
    put_crumbs(block, 64, 32, q, 128, 0)
    put_scales(block, 96, codes)
    put_half(block, 108, d)


@njit(inline="always")
def _encode_q6_k(x: Any, importance: Any, q: Any, block: Any, weighted: Any) -> None:
    w, scales = scratch_f32(16), scratch_f32(16)
    for j in range(16):
        xj = offset(x, 16 * j)
        for i in range(16):
            w[i] = importance[16 * j + i] if weighted else xj[i] * xj[i]
        scales[j] = search_signed(xj, w, offset(q, 16 * j), 16, _32)
    peak, magnitude = largest(scales, 16)
    zero = magnitude < EPS
    inverse = -_128 / peak
    d = where(zero, 0, half(1 / inverse))
    for j in range(16):
        code = nearest(inverse * scales[j])
        code = where(zero, 0, where(code < _127, code, _127))
        put(block, 192 + j, to_int(code))
        _requantize(offset(x, 16 * j), offset(q, 16 * j), 16, half_to_f32(d) * code, f32(0), -_32, _31)
    for i in range(256):
        q[i] = where(zero, 0, q[i])
    for c in range(2):
        put_nibbles(block, 64 * c, 64, q, 128 * c)
        put_crumbs(block, 128 + 32 * c, 32, q, 128 * c, 4)
    put_half(block, 208, d)


K_QUANTIZERS = block_quantizers(
    Q2_K=_encode_q2_k, Q3_K=_encode_q3_k, Q4_K=_encode_q4_k, Q5_K=_encode_q5_k, Q6_K=_encode_q6_k
)
