"""Quantizing many groups of 32 weights side by side, one group in each lane of a vector.

To give the same bytes as ggml, each sum must be added up in ggml's order. So no group is split over lanes: every lane
goes through the scalar algorithm with a group of its own, and LLVM turns the innermost loops, always over lanes, into
vector code. Arrays of a tile are [32, LANES]: weight i of the group in lane k stands at [i, k].

All arithmetic is float32 and rounds after each operation, as ggml compiled for any x86-64 does (no fused multiply-add).
"""

from typing import Any

import numpy as np

from gguf_run.formats.jit import njit
from gguf_run.formats.scalars import nearest_int

LANES = 64  # the loops' own cost and the latency of sums are hidden from here on; a tile of f32 is 8 KB
GROUP = 32
_ROWS = 8  # rows whose sums are added up side by side

_0, _1, _INFINITY = np.float32(0), np.float32(1), np.float32(np.inf)
_EPS = np.float32(1e-15)  # ggml's GROUP_MAX_EPS: a group without a larger weight is all zeros


@njit
def load_tile(x: Any, first: int, xs: Any) -> None:
    """xs f32[32, LANES] = groups first, first + 1, ... of x f32[n]; lanes past the end repeat the last group."""
    last = len(x) // GROUP - 1
    for k in range(LANES):
        group = x[min(first + k, last) * GROUP :][:GROUP]
        for i in range(GROUP):
            xs[i, k] = group[i]


@njit
def load_weights(x: Any, first: int, xs: Any, importance: Any, sigma2: Any, ws: Any) -> None:
    """ws f32[32, LANES] = importance * sqrt(sigma2 + x**2), x being the tile xs; groups as in `load_tile`.

    importance f32[n], for rows of n weights; sigma2 f32[:], one for each equal part of x (see mean_squares).
    """
    n_groups = len(x) // GROUP
    groups_per_row, groups_per_mean = len(importance) // GROUP, n_groups // len(sigma2)
    for k in range(LANES):
        group = min(first + k, n_groups - 1)
        w = importance[group % groups_per_row * GROUP :][:GROUP]
        s = sigma2[group // groups_per_mean]
        for i in range(GROUP):
            ws[i, k] = w[i] * np.sqrt(s + xs[i, k] * xs[i, k])


@njit
def sums_of_squares(x: Any, n: int) -> Any:
    """The sums of the squares of each n weights in x, each added up from left to right: f32[len(x) // n]."""
    n_rows = len(x) // n
    sums = np.zeros(n_rows, np.float32)
    acc = np.empty(_ROWS, np.float32)
    for first in range(0, n_rows, _ROWS):
        rows = min(_ROWS, n_rows - first)
        acc[:] = 0
        if rows == _ROWS:
            for i in range(first * n, first * n + n):
                for r in range(_ROWS):
                    acc[r] += x[i + r * n] * x[i + r * n]
        else:
            for r in range(rows):
                for i in range(n):
                    acc[r] += x[(first + r) * n + i] * x[(first + r) * n + i]
        sums[first : first + rows] = acc[:rows]
    return sums


@njit
def fit_scale(xs: Any, ws: Any, n_max: int, q: Any, d: Any) -> None:
    """Find d f32[LANES] and q u8[32, LANES] so that sum w * (x - d * (q - n_max))**2 is small, 0 <= q < 2 * n_max.

    Tries 19 scales about -n_max / x, x being the weight of largest magnitude, each with the d that is best for its q
    (ggml's make_qx_quants with weights).
    """
    top = np.zeros(LANES, np.float32)
    scale, best_scale = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    best, sum_lx, sum_l2 = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    low, high, middle = np.int32(-n_max), np.int32(n_max - 1), np.float32(n_max)
    for i in range(GROUP):
        for k in range(LANES):
            top[k] = xs[i, k] if abs(xs[i, k]) > abs(top[k]) else top[k]
    for step in range(19):  # first the middle, then -9 .. -1 and 1 .. 9 tenths off it
        offset = 0 if step == 0 else step - 10 if step < 10 else step - 9
        numerator = -(middle + np.float32(0.1) * np.float32(offset))
        for k in range(LANES):
            scale[k] = numerator / top[k]
            sum_lx[k] = sum_l2[k] = 0
        for i in range(GROUP):
            for k in range(LANES):
                level: Any = np.float32(max(low, min(high, nearest_int(scale[k] * xs[i, k]))))
                sum_lx[k] += ws[i, k] * xs[i, k] * level
                sum_l2[k] += ws[i, k] * level * level
        for k in range(LANES):
            if step == 0 or (sum_l2[k] > _0 and sum_lx[k] * sum_lx[k] > best[k] * sum_l2[k]):
                d[k] = sum_lx[k] / sum_l2[k] if sum_l2[k] != _0 else _0
                best[k] = d[k] * sum_lx[k]
                best_scale[k] = scale[k]
    for k in range(LANES):
        d[k] = _0 if abs(top[k]) < _EPS else d[k]
    for i in range(GROUP):
        for k in range(LANES):
            level = max(low, min(high, nearest_int(best_scale[k] * xs[i, k]))) + np.int32(n_max)
            q[i, k] = 0 if abs(top[k]) < _EPS else level


@njit
def fit_scale_and_minimum(xs: Any, ws: Any, n_max: int, q: Any, d: Any, m: Any) -> None:
    """Find d, m f32[LANES] and q u8[32, LANES] so that sum w * (x - d * q - m)**2 is small, 0 <= q <= n_max, m <= 0.

    Tries 37 scales from 0.9 below n_max / (largest - smallest x) to 0.9 above, each with the d and m that are best for
    its q (ggml's make_qkx3_quants with weights).
    """
    top, scale, best, q_scale, q_m, spread = np.empty((6, LANES), np.float32)
    sum_w, sum_x, sum_l, sum_l2, sum_xl = np.empty((5, LANES), np.float32)
    new_d, new_m, error = np.empty((3, LANES), np.float32)
    ls = np.empty((GROUP, LANES), np.float32)
    zero, high = np.int32(0), np.int32(n_max)
    for k in range(LANES):
        m[k] = top[k] = xs[0, k]
        sum_w[k] = ws[0, k]
        sum_x[k] = ws[0, k] * xs[0, k]
    for i in range(1, GROUP):
        for k in range(LANES):
            m[k] = xs[i, k] if xs[i, k] < m[k] else m[k]
            top[k] = xs[i, k] if xs[i, k] > top[k] else top[k]
            sum_w[k] += ws[i, k]
            sum_x[k] += ws[i, k] * xs[i, k]
    for k in range(LANES):
        m[k] = _0 if m[k] > _0 else m[k]
        spread[k] = top[k] - m[k]
        q_scale[k] = np.float32(n_max) / spread[k]
        q_m[k] = m[k]
        d[k] = _1 / q_scale[k]
        best[k] = 0
    for i in range(GROUP):
        for k in range(LANES):
            level: Any = np.float32(max(zero, min(high, nearest_int(q_scale[k] * (xs[i, k] - m[k])))))
            diff = d[k] * level + m[k] - xs[i, k]
            best[k] += ws[i, k] * (diff * diff)
    for step in range(37):
        numerator = np.float32(-0.9) + np.float32(0.05) * np.float32(step) + np.float32(n_max)
        for k in range(LANES):
            scale[k] = numerator / (top[k] - m[k])
            sum_l[k] = sum_l2[k] = sum_xl[k] = error[k] = 0
        for i in range(GROUP):
            for k in range(LANES):
                level = np.float32(max(zero, min(high, nearest_int(scale[k] * (xs[i, k] - m[k])))))
                ls[i, k] = level
                wl = ws[i, k] * level
                sum_l[k] += wl
                sum_l2[k] += wl * level
                sum_xl[k] += wl * xs[i, k]
        for k in range(LANES):
            determinant = sum_w[k] * sum_l2[k] - sum_l[k] * sum_l[k]
            m_k = (sum_l2[k] * sum_x[k] - sum_l[k] * sum_xl[k]) / determinant
            d_k = (sum_w[k] * sum_xl[k] - sum_x[k] * sum_l[k]) / determinant
            new_d[k] = sum_xl[k] / sum_l2[k] if m_k > _0 else d_k
            new_m[k] = _0 if m_k > _0 else m_k
            error[k] = _0 if determinant > _0 else _INFINITY  # never taken: no scale is best for this q
        for i in range(GROUP):
            for k in range(LANES):
                diff = new_d[k] * ls[i, k] + new_m[k] - xs[i, k]
                error[k] += ws[i, k] * (diff * diff)
        for k in range(LANES):
            better = error[k] < best[k]
            best[k] = error[k] if better else best[k]
            d[k] = new_d[k] if better else d[k]
            q_scale[k] = scale[k] if better else q_scale[k]
            q_m[k] = m[k] if better else q_m[k]  # the minimum that gave this q, not the new one
            m[k] = new_m[k] if better else m[k]
    for i in range(GROUP):
        for k in range(LANES):
            level = max(zero, min(high, nearest_int(q_scale[k] * (xs[i, k] - q_m[k]))))
            q[i, k] = level if spread[k] > _0 else zero
    for k in range(LANES):
        d[k] = d[k] if spread[k] > _0 else _0
