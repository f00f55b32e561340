"""Rows are scaled in place: logits by a factor and a soft cap, the result of a shared expert by its gate."""

import math

from gguf_run.formats.compiler.jit import carray, intrinsic, types
from gguf_run.kernels_cpu.replay.op import items, n_pieces, op
from gguf_run.kernels_cpu.vector.kernel import kernel
from gguf_run.kernels_cpu.vector.native import f32_at, i64_at
from gguf_run.kernels_cpu.vector.simd import F32, Simd, Val

_PIECE = 512  # columns that a thread takes at a time


@intrinsic
def _cap(typing_context, x, n_vectors, factor, cap):
    """x = cap * tanh(factor * x), 16 columns at a time: tanh(y) = 1 - 2 / (1 + e^2y)."""

    def emit(s: Simd, x: Val, n_vectors: Val, factor: Val, cap: Val) -> None:
        twice, high = (s.splat(value, 16) for value in (factor * 2.0, cap))

        def body(i: Val, none: list[Val]) -> list[Val]:
            at = x + i * 64
            s.store(high - high * 2.0 / (s.exp(s.load(at, F32, 16) * twice) + 1.0), at)
            return none

        s.loop(n_vectors, [], body)

    return kernel(types.void(types.intp, types.intp, types.float32, types.float32), emit)


@op("rows n x x_stride", "scale cap")
def softcap(args, piece, ith, nth):
    """x = cap * tanh(scale * x / cap), or scale * x if cap is 0. Rows have memory for whole vectors of 16 columns."""
    a = carray(args, 1)[0]
    per_row = (a.n + _PIECE - 1) // _PIECE
    n_items = i64_at(a.rows, 1)[0] * per_row
    if piece < 0:
        return n_pieces(n_items, 8, nth)
    first, end = items(piece, n_items, 8, nth)
    for item in range(first, end):
        start = item % per_row * _PIECE
        n, at = min(_PIECE, a.n - start), a.x + item // per_row * a.x_stride + start * 4
        if a.cap:
            _cap(at, (n + 15) // 16, a.scale / a.cap, a.cap)
        else:
            x = f32_at(at, n)
            for i in range(n):
                x[i] *= a.scale
    return 0


@op("rows n x x_stride gate gate_stride")
def gate_rows(args, piece, ith, nth):
    """x[t] *= sigmoid(gate[t, 0])."""
    a = carray(args, 1)[0]
    n_items = i64_at(a.rows, 1)[0]
    if piece < 0:
        return n_pieces(n_items, 4, nth)
    first, end = items(piece, n_items, 4, nth)
    for t in range(first, end):
        x, factor = f32_at(a.x + t * a.x_stride, a.n), 1 / (1 + math.exp(-f32_at(a.gate + t * a.gate_stride, 1)[0]))
        for i in range(a.n):
            x[i] *= factor
    return 0
