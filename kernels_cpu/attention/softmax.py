"""The running softmax of attention: tiles of scores, f32[n_rows][SPAN], and the maximum of each row so far.

The maximum may be too small by HEADROOM, because e^8 is not a large number. A span in which no score exceeds this needs
no sum across lanes, and no earlier sum is rescaled. FlashAttention-4 does the same.
"""

import functools
import math

import numpy as np
from llvmlite import ir

from gguf_run.formats.compiler.jit import njit
from gguf_run.kernels_cpu.attention.hadamard import hadamard
from gguf_run.kernels_cpu.attention.plan import row_of
from gguf_run.kernels_cpu.attention.sizes import SPAN
from gguf_run.kernels_cpu.panels.panels import ROWS
from gguf_run.kernels_cpu.vector.lowering import simd_kernel
from gguf_run.kernels_cpu.vector.native import f32_at
from gguf_run.kernels_cpu.vector.simd import F32, I32, Simd, Val

HEADROOM = np.float32(8)
LOWEST = np.float32(-1e38)  # the maximum of no scores. It is far above NEVER: a hidden score never raises a maximum
NEVER = np.float32(-3e38)  # the score of a hidden position
_VECTORS = [64 * i for i in range(SPAN // ROWS)]  # byte offsets of the vectors of a row


def _row(s: Simd, scores: Val) -> list[Val]:
    return [s.load(scores + at, F32, ROWS) for at in _VECTORS]


@simd_kernel(floats="value")
def hide(s: Simd, scores: Val, since: Val, until: Val, value: Val) -> None:
    """Write `value` to the positions of a row outside since <= position < until."""
    hidden = s.splat(value, ROWS)
    first, end = (s.splat(limit.to(I32), ROWS) for limit in (since, until))
    lanes = Val(s, ir.Constant(ir.VectorType(I32, ROWS), list(range(ROWS))))
    for at, row in zip(_VECTORS, _row(s, scores), strict=True):
        position = lanes + at // 4
        seen = position.compare(">=", first) & position.compare("<", end)
        s.store(s.select(seen, row, hidden), scores + at)


@simd_kernel(floats="softcap")
def cap(s: Simd, scores: Val, n_rows: Val, softcap: Val) -> None:
    """scores = softcap * tanh(scores / softcap), where tanh(x) = 1 - 2 / (e^2x + 1)."""
    factor, top = s.splat(s.const(F32, 2.0) / softcap, ROWS), s.splat(softcap, ROWS)

    def body(r: Val) -> None:
        at = scores + r * (4 * SPAN)
        for offset, row in zip(_VECTORS, _row(s, at), strict=True):
            lower = s.const(F32, 2.0, ROWS) / (s.exp(row * factor) + 1.0)
            s.store(top - top * lower, at + offset)

    s.each(n_rows, body)


@simd_kernel
def rise(s: Simd, scores: Val, n_rows: Val, most: Val) -> Val:
    """The most by which a score exceeds the maximum of its row so far. most: address of the maxima, f32[n_rows]."""

    def body(r: Val, above: list[Val]) -> list[Val]:
        highest = functools.reduce(s.maximum, _row(s, scores + r * (4 * SPAN)))
        return [s.maximum(highest - s.load(most + r * 4, F32, splat=ROWS), above[0])]

    return s.fold(s.loop(n_rows, [s.const(F32, float(NEVER), ROWS)], body)[0], s.maximum)


@simd_kernel
def raise_maximum(s: Simd, scores: Val, most: Val) -> Val:
    """Raise the maximum of a row, f32 at `most`, to its largest score; return the factor for the sums of the row."""
    old = s.load(most, F32)
    new = s.maximum(s.fold(functools.reduce(s.maximum, _row(s, scores)), s.maximum), old)
    s.store(new, most)
    return s.fold(s.exp(s.splat(old - new, 2), bounded=True), lambda a, b: a)


@simd_kernel
def exponentials(s: Simd, scores: Val, n_rows: Val, most: Val, sums: Val) -> None:
    """scores = exp(scores - maximum); sums, f32[n_rows, 16], += scores, lane by lane."""

    def body(r: Val) -> None:
        at, sum_at = scores + r * (4 * SPAN), sums + r * (4 * ROWS)
        shift = s.load(most + r * 4, F32, splat=ROWS)
        values = [s.exp(row - shift, bounded=True) for row in _row(s, at)]
        for value, offset in zip(values, _VECTORS, strict=True):
            s.store(value, at + offset)
        s.store(functools.reduce(lambda a, b: a + b, values, s.load(sum_at, F32, ROWS)), sum_at)

    s.each(n_rows, body)


@simd_kernel
def lane_sum(s: Simd, address: Val) -> Val:
    """The sum of f32[16]."""
    return s.sum(s.load(address, F32, ROWS))


@simd_kernel(floats="factor")
def scale_vectors(s: Simd, address: Val, n: Val, factor: Val) -> None:
    """f32[16 * n] at an address *= factor."""
    factors = s.splat(factor, ROWS)
    s.each(n, lambda i: s.store(s.load(address + i * 64, F32, ROWS) * factors, address + i * 64))


@njit(inline="always")
def n_visible(piece, r, start):
    """How many positions from `start` on a query row may see. Rows that fill a tile are like the last one."""
    return piece.n_past + min(r, piece.n_rows - 1) // piece.n_rep + 1 + piece.ahead - start


@njit(inline="always")
def _n_hidden(a, until, start):
    """How many positions from `start` on are before the window of a row whose own one is before `until`; <= 0: none."""
    if not a.window:
        return 0
    return (start + until - 1) // a.window * a.window - start if a.is_chunked else until - a.window


@njit(inline="always")
def _hide(a, piece, m, tile, r, start, value):
    """Replace the scores, or exponentials, of the positions that the rows of a tile do not see."""
    for row in range(tile.rows):
        until = n_visible(piece, r + row, start)
        hide(m.scores + row * SPAN * 4, _n_hidden(a, until - piece.ahead, start), min(until, piece.stop - start), value)


@njit(inline="always")
def softmax(a, piece, m, tile, r, start):
    """Replace the scores of a tile by exponentials. Sums that the rows have so far follow a maximum that rises."""
    if a.softcap:
        cap(m.scores, tile.rows, np.float32(a.softcap))
    last = n_visible(piece, r + tile.rows - 1, start)
    hides = min(n_visible(piece, r, start), piece.stop - start) < SPAN or _n_hidden(a, last - piece.ahead, start) > 0
    if hides:
        _hide(a, piece, m, tile, r, start, NEVER)
    if rise(m.scores, tile.rows, m.most + r * 4) > HEADROOM:
        for row in range(r, r + tile.rows):
            scores, most = m.scores + (row - r) * SPAN * 4, m.most + row * 4
            if rise(scores, 1, most) > HEADROOM:
                factor = raise_maximum(scores, most)
                scale_vectors(m.sums + row * a.wide * 4, a.wide // ROWS, factor)
                scale_vectors(m.lane_sums + row * ROWS * 4, 1, factor)
    exponentials(m.scores, tile.rows, m.most + r * 4, m.lane_sums + r * ROWS * 4)
    if hides:
        _hide(a, piece, m, tile, r, start, np.float32(0))


@njit(inline="always")
def scaled_copy(source, n, factor, to):
    """to = factor * source, f32[n]."""
    x, out = f32_at(source, n), f32_at(to, n)
    for i in range(n):
        out[i] = x[i] * factor


@njit(inline="always")
def result(a, piece, m, r):
    """Store the result of a query row: in out, or, if the positions are split, the total for `merge`."""
    total = lane_sum(m.lane_sums + r * ROWS * 4)
    if piece.part >= 0:
        f32_at(m.most + a.max_rows * 4, piece.n_rows)[r] = total
    else:
        n, factor = a.n_value, np.float32(1)
        t, head = row_of(piece, r)
        if a.sinks:
            sink, highest = f32_at(a.sinks, a.n_head)[head], f32_at(m.most, piece.n_rows)[r]
            factor = np.float32(math.exp(highest - max(highest, sink)))
            total = total * factor + np.float32(math.exp(sink - max(highest, sink)))
        out = a.out + t * a.out_stride + head * n * 4
        scaled_copy(m.sums + r * a.wide * 4, n, factor / total, out)
        if a.v_rotate:
            hadamard(out, n)
