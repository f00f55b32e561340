"""The searches of the K-quants: each finds the scale and the quants of a group of n weights, for LANES groups at once.

All do the operations of ggml's reference quantizer (ggml-quants.c) in its order, and so round as it does. Nothing may
be reordered or contracted to fused multiply-adds. Arguments that recur:

    x   CPointer(F32)    weight i of all groups is vector x[i]
    w   CPointer(F32)    w[i] weights the error of x[i]
    q   CPointer(F32)    the search writes the quants here: whole numbers

Limits and steps are np.float32, as C would convert them.
"""

from typing import Any

import numpy as np

from gguf_run.formats.compiler.jit import njit
from gguf_run.formats.quantizers.lanes import any_lane, bits, f32, fabs, from_bits, sqrt, to_float, to_int, where

EPS = np.float32(1e-15)  # a group whose weights are all smaller counts as zero
_TENTH = np.float32(0.1)
_MAGIC = np.float32(3 << 22)  # adding it rounds to nearest, ties to even: floats from 2**23 to 2**24 are whole


@njit(forceinline=True)
def nearest(v: Any) -> Any:
    """v rounded to a whole number if |v| < 2**22; else, and for infinity and NaN, what ggml's nearest_int returns.

    ggml takes the 23 mantissa bits m of v + _MAGIC and returns m - 2**22. Here m gets the exponent of 2**23 instead.
    """
    return from_bits((bits(v + _MAGIC) & 0x7FFFFF) | 0x4B000000) - _MAGIC


@njit(forceinline=True)
def quant(v: Any, lowest: Any, highest: Any) -> Any:
    """nearest(v), limited to lowest..highest."""
    v = nearest(v)
    v = where(v > lowest, v, lowest)
    return where(v < highest, v, highest)


@njit(forceinline=True)
def sum_of_squares(x: Any, n: Any) -> Any:
    total = f32(0)
    for i in range(n):
        total += x[i] * x[i]
    return total


@njit(forceinline=True)
def weigh(x: Any, importance: Any, w: Any, n: Any, sigma2: Any) -> Any:
    """w = importance * sqrt(sigma2 + x**2); returns the sum of w."""
    total = f32(0)
    for i in range(n):
        w[i] = importance[i] * sqrt(sigma2 + x[i] * x[i])
        total += w[i]
    return total


@njit(forceinline=True)
def search_min(x: Any, w: Any, q: Any, n: Any, nmax: Any, first: Any, step: Any, n_step: Any, absolute: Any) -> Any:
    """x ~ scale * q - minimum with q in 0..nmax and minimum >= 0; returns scale, minimum.

    Tries the inverse scales (nmax + first + step * i) / range for i in 0..n_step. The quants of each inverse scale give
    the best scale and minimum by least squares, weighted by w. The trial of the least error wins: the absolute error if
    `absolute`, else the squared error. ggml's make_qkx2_quants and make_qkx3_quants.
    """
    low, high = x[0], x[0]
    sum_w = w[0]
    sum_x = sum_w * x[0]
    for i in range(1, n):
        low = where(x[i] < low, x[i], low)
        high = where(x[i] > high, x[i], high)
        sum_w += w[i]
        sum_x += w[i] * x[i]
    low = where(low > 0, 0, low)
    varied = high > low
    minimum = low
    iscale = nmax / (high - low)
    scale, best_iscale, best_low, best = 1 / iscale, iscale, low, f32(0)
    for i in range(n):
        difference = scale * quant(iscale * (x[i] - low), 0, nmax) + low - x[i]
        best += w[i] * (fabs(difference) if absolute else difference * difference)
    for k in range(n_step + 1):
        iscale = (first + step * np.float32(k) + nmax) / (high - minimum)
        sum_l, sum_l2, sum_xl = f32(0), f32(0), f32(0)
        for i in range(n):
            level = quant(iscale * (x[i] - minimum), 0, nmax)
            q[i] = level
            wl = w[i] * level
            sum_l += wl
            sum_l2 += wl * level
            sum_xl += wl * x[i]
        det = sum_w * sum_l2 - sum_l * sum_l
        this_scale = (sum_w * sum_xl - sum_x * sum_l) / det
        this_min = (sum_l2 * sum_x - sum_l * sum_xl) / det
        over = this_min > 0
        this_min = where(over, 0, this_min)
        this_scale = where(over, sum_xl / sum_l2, this_scale)
        error = f32(0)
        for i in range(n):
            difference = this_scale * q[i] + this_min - x[i]
            error += w[i] * (fabs(difference) if absolute else difference * difference)
        better = (det > 0) & (error < best) & varied
        best = where(better, error, best)
        best_iscale = where(better, iscale, best_iscale)
        best_low = where(better, minimum, best_low)
        scale = where(better, this_scale, scale)
        minimum = where(better, this_min, minimum)
    for i in range(n):
        q[i] = where(varied, quant(best_iscale * (x[i] - best_low), 0, nmax), 0)
    return where(varied, scale, 0), minimum * np.float32(-1)


@njit(forceinline=True)
def largest(x: Any, n: Any) -> Any:
    """The number of largest magnitude (the first of several), and its magnitude."""
    value, magnitude = f32(0), f32(0)
    for i in range(n):
        more = fabs(x[i]) > magnitude
        magnitude = where(more, fabs(x[i]), magnitude)
        value = where(more, x[i], value)
    return value, magnitude


@njit(forceinline=True)
def _scale_sums(x: Any, w: Any, n: Any, nmax: Any, iscale: Any) -> Any:
    """sum(w x l) and sum(w l l) for the quants l that belong to an inverse scale."""
    sum_lx, sum_l2 = f32(0), f32(0)
    for i in range(n):
        level = quant(iscale * x[i], -nmax, nmax - 1)
        sum_lx += w[i] * x[i] * level
        sum_l2 += w[i] * level * level
    return sum_lx, sum_l2


@njit(forceinline=True)
def search_signed(x: Any, w: Any, q: Any, n: Any, nmax: Any) -> Any:
    """x ~ scale * (q - nmax) with q in 0..2 nmax - 1; returns scale.

    Tries the inverse scales for which the weight of largest magnitude becomes -(nmax + i / 10), i in -9..9. ggml's
    make_qx_quants.
    """
    peak, magnitude = largest(x, n)
    zero = magnitude < EPS
    iscale = -nmax / peak
    sum_lx, sum_l2 = _scale_sums(x, w, n, nmax, iscale)
    scale = where(sum_l2 != 0, sum_lx / sum_l2, 0)
    best, best_iscale = scale * sum_lx, iscale
    for k in range(-9, 10):
        if k != 0:
            iscale = -(nmax + _TENTH * np.float32(k)) / peak
            sum_lx, sum_l2 = _scale_sums(x, w, n, nmax, iscale)
            better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
            scale = where(better, sum_lx / sum_l2, scale)
            best = where(better, scale * sum_lx, best)
            best_iscale = where(better, iscale, best_iscale)
    for i in range(n):
        q[i] = where(zero, 0, quant(best_iscale * x[i], -nmax, nmax - 1) + nmax)
    return where(zero, 0, scale)


@njit(forceinline=True)
def _descend(x: Any, w: Any, q: Any, n: Any, lowest: Any, highest: Any, sum_lx: Any, sum_l2: Any, strict: Any) -> Any:
    """Change single quants if that lowers the error of the best scale, in up to five rounds; returns the best scale.

    strict: sum_l2 without the weight must be positive (make_qp_quants). Not strict: the new sum_l2 must be positive
    (make_q3_quants).
    """
    for _ in range(5):
        changed = f32(0) > 0
        for i in range(n):
            wx = w[i] * x[i]
            slx = sum_lx - wx * q[i]
            sl2 = sum_l2 - w[i] * q[i] * q[i]
            level = quant(x[i] * sl2 / slx, lowest, highest)
            new_lx = slx + wx * level
            new_l2 = sl2 + w[i] * level * level
            better = (slx > 0) & (level != q[i]) & ((sl2 if strict else new_l2) > 0)
            better = better & (new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
            q[i] = where(better, to_float(to_int(level) & 255) if strict else level, q[i])
            sum_lx = where(better, new_lx, sum_lx)
            sum_l2 = where(better, new_l2, sum_l2)
            changed = changed | better
        if not any_lane(changed):
            break
    return where(sum_l2 > 0, sum_lx / sum_l2, 0)


@njit(forceinline=True)
def search_signed_3bit(x: Any, w: Any, q: Any, n: Any, nmax: Any) -> Any:
    """Find q, from 0 to 2 nmax - 1, and scale, so that scale * (q - nmax) is close to x. Return scale.

    Coordinate descent, as in ggml's make_q3_quants.
    """
    peak, magnitude = largest(x, n)
    zero = magnitude < EPS
    iscale = -nmax / peak
    sum_lx, sum_l2 = _scale_sums(x, w, n, nmax, iscale)
    for i in range(n):
        q[i] = quant(iscale * x[i], -nmax, nmax - 1)
    scale = _descend(x, w, q, n, -nmax, nmax - 1, sum_lx, sum_l2, False)
    for i in range(n):
        q[i] = where(zero, 0, q[i] + nmax)
    return where(zero, 0, scale)


@njit(forceinline=True)
def search_positive(x: Any, w: Any, q: Any, n: Any, nmax: Any) -> Any:
    """x ~ scale * q for x >= 0 with q in 0..nmax; returns scale. ggml's make_qp_quants."""
    peak = f32(0)
    for i in range(n):
        peak = where(peak > x[i], peak, x[i])
    zero = peak < EPS
    iscale = nmax / peak
    scale, best_iscale, best = 1 / iscale, iscale, f32(0)
    for i in range(n):
        difference = x[i] - scale * to_float(to_int(nearest(iscale * x[i])) & 255)
        best += w[i] * difference * difference
    for k in range(-4, 5):
        if k != 0:
            iscale = (_TENTH * np.float32(k) + nmax) / peak
            scale = 1 / iscale
            error = f32(0)
            for i in range(n):
                difference = x[i] - scale * quant(iscale * x[i], -_MAGIC, nmax)
                error += w[i] * difference * difference
            better = error < best
            best = where(better, error, best)
            best_iscale = where(better, iscale, best_iscale)
    sum_lx, sum_l2 = f32(0), f32(0)
    for i in range(n):
        level = quant(best_iscale * x[i], -_MAGIC, nmax)
        q[i] = to_float(to_int(level) & 255)
        sum_lx += w[i] * x[i] * level
        sum_l2 += w[i] * level * level
    scale = _descend(x, w, q, n, -_MAGIC, nmax, sum_lx, sum_l2, True)
    for i in range(n):
        q[i] = where(zero, 0, q[i])
    return where(zero, 0, scale)
