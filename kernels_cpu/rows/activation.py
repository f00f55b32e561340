"""out = activation(gate) * up, row by row."""

import functools
import math

from gguf_run.formats.compiler.jit import njit
from gguf_run.kernels_cpu.replay.op import TapeOp, n_rows, row_op
from gguf_run.kernels_cpu.rows.quantize import quantize_row
from gguf_run.kernels_cpu.vector.lowering import simd_kernel
from gguf_run.kernels_cpu.vector.native import f32_at
from gguf_run.kernels_cpu.vector.simd import F32, Simd, Val
from gguf_run.models.ops import ACTIVATIONS

PIECE = 512  # columns that a thread takes at a time: whole blocks of 32
_GELU = 1.5957691216057308  # 2 * sqrt(2 / pi)
_ALPHA, _LIMIT = 1.702, 7.0


# All activations are x * sigmoid(f(x)):
#   silu        f(x) = x
#   gelu        f(x) = _GELU * (x + 0.044715 x^3), the tanh form
#   swiglu_oai  f(x) = _ALPHA * x (gpt-oss); x and up are limited by _LIMIT first, and up grows by 1
@simd_kernel
def gated_row(s: Simd, activation: int, gate: Val, up: Val, out: Val, n_vectors: Val) -> None:
    """out = activation(gate) * up for n_vectors times 16 columns.

    activation: place in ACTIVATIONS. gate, up, out: addresses of f32.
    """
    name = ACTIVATIONS[activation]

    def body(i: Val) -> None:
        g, u = s.load(gate + i * 64, F32, 16), s.load(up + i * 64, F32, 16)
        if name == "swiglu_oai":
            limit = s.const(F32, _LIMIT, 16)
            g = s.select(g.compare(">", limit), limit, g)
            u = s.select(u.compare(">", limit), limit, s.select(u.compare("<", -_LIMIT), limit * -1.0, u)) + 1.0
        f = {"silu": -1.0, "gelu": -_GELU, "swiglu_oai": -_ALPHA}[name]
        s.store(g / (s.exp((g + g * g * g * 0.044715 if name == "gelu" else g) * f) + 1.0) * u, out + i * 64)

    s.each(n_vectors, body)


@njit(inline="always")
def per_row(a):
    """The pieces of a row: PIECE columns each."""
    return (a.n + PIECE - 1) // PIECE


@functools.cache
def gated(activation: str) -> TapeOp:
    """Return the op for silu or gelu. n: columns. q8: int8 form of the result, or 0."""
    is_gelu = ("silu", "gelu").index(activation)

    @row_op(
        "rows n gate gate_stride up up_stride out out_stride q8 q8_stride", n_items=lambda a: n_rows(a) * per_row(a)
    )
    def gated_rows(a, first, end):
        for item in range(first, end):
            t, start = item // per_row(a), item % per_row(a) * PIECE
            n = min(PIECE, a.n - start)
            gate, up = a.gate + t * a.gate_stride + start * 4, a.up + t * a.up_stride + start * 4
            out = a.out + t * a.out_stride + start * 4
            gated_row(is_gelu, gate, up, out, n // 16)
            g, u, o = f32_at(gate, n), f32_at(up, n), f32_at(out, n)
            for i in range(n // 16 * 16, n):
                f = _GELU * (g[i] + 0.044715 * g[i] * g[i] * g[i]) if is_gelu else g[i]
                o[i] = g[i] / (1 + math.exp(-f)) * u[i]
            if a.q8:
                quantize_row(out, n // 32, a.q8 + t * a.q8_stride + start * 2)

    return gated_rows
