"""out = activation(gate) * up, or xielu(x), row by row."""

import functools
import math

import numpy as np

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
_TANH, _RELU2, _SIGMOID, _IDENTITY, _ERF = map(ACTIVATIONS.index, ("gelu", "relu2", "sigmoid", "identity", "gelu_erf"))
# erfc(z) = e^(-z^2) * a polynomial of t = 1 / (1 + p z), as Abramowitz and Stegun, 7.1.26, with a fit of 7 terms: its
# relative error is below 1.5e-7 for z < 2, and below 3e-6 up to 6.
_ERFC_P, _ERFC = 0.475, (
    0.0887899731, -0.411702736, 0.572767008, -0.0996288404, 0.328473354, 0.252171482, 0.269129614, 0.0,
)  # fmt: skip


def _normal(s: Simd, x: Val) -> Val:
    """The distribution function of the normal distribution: erfc(-x / sqrt(2)) / 2."""
    z = s.maximum(x, x * -1.0) * 0.7071067811865476
    t = s.const(F32, 1.0, 16) / (z * _ERFC_P + 1.0)
    p = functools.reduce(lambda p, c: p * t + c, _ERFC[1:], s.const(F32, _ERFC[0], 16))
    tail = p * s.exp(z * z * -1.0) * 0.5
    return s.select(x.compare(">", 0.0), s.const(F32, 1.0, 16) - tail, tail)


# relu2 is max(x, 0)^2, identity is x, and sigmoid is sigmoid(f(x)) with f(x) = x. The others are x * sigmoid(f(x)):
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
        f = {"gelu": -_GELU, "swiglu_oai": -_ALPHA}.get(name, -1.0)
        if name == "relu2":
            g = s.maximum(g, s.const(F32, 0.0, 16))
            g = g * g
        elif name == "gelu_erf":
            g = g * _normal(s, g)
        elif name != "identity":
            above = s.const(F32, 1.0, 16) if name == "sigmoid" else g
            g = above / (s.exp((g + g * g * g * 0.044715 if name == "gelu" else g) * f) + 1.0)
        s.store(g * u, out + i * 64)

    s.each(n_vectors, body)


@njit(inline="always")
def _activated(activation, x):
    """activation(x) of one number. activation: place in ACTIVATIONS; not swiglu_oai."""
    if activation == _RELU2:
        return max(x, np.float32(0)) ** 2
    if activation == _IDENTITY:
        return x
    if activation == _ERF:
        return x * math.erfc(-x * 0.7071067811865476) / 2
    f = _GELU * (x + 0.044715 * x * x * x) if activation == _TANH else x
    return (1 if activation == _SIGMOID else x) / (1 + math.exp(-f))


@simd_kernel(floats="alpha_p alpha_n beta eps")
def _xielu_row(s: Simd, x: Val, out: Val, n_vectors: Val, alpha_p: Val, alpha_n: Val, beta: Val, eps: Val) -> None:
    """out = xielu(x) for n_vectors times 16 columns, see models.rare_ops.Xielu.

    e^m - 1 - m is a sum of powers of m above -0.5, where a difference would lose its bits.
    """
    alpha_p, alpha_n, beta, eps = (s.splat(value, 16) for value in (alpha_p, alpha_n, beta, eps))

    def body(i: Val) -> None:
        v = s.load(x + i * 64, F32, 16)
        m = s.minimum(v, eps)
        rest = s.const(F32, 1.0, 16)
        for k in range(9, 2, -1):
            rest = s.fma(rest * m, s.const(F32, 1 / k, 16), s.const(F32, 1.0, 16))
        rest = s.select(m.compare(">", -0.5), rest * m * m * 0.5, s.exp(m) - 1.0 - m)
        low = alpha_n * (rest + (m - v))
        s.store(s.select(v.compare(">", 0.0), alpha_p * v * v, low) + beta * v, out + i * 64)

    s.each(n_vectors, body)


@njit(inline="always")
def per_row(a):
    """The pieces of a row: PIECE columns each."""
    return (a.n + PIECE - 1) // PIECE


@functools.cache
def gated(activation: str) -> TapeOp:
    """Return the op for one of ACTIVATIONS. n: columns. q8: int8 form of the result, or 0."""
    activation_id = ACTIVATIONS.index(activation)

    @row_op(
        "rows n gate gate_stride up up_stride out out_stride q8 q8_stride", n_items=lambda a: n_rows(a) * per_row(a)
    )
    def gated_rows(a, first, end):
        for item in range(first, end):
            t, start = item // per_row(a), item % per_row(a) * PIECE
            n = min(PIECE, a.n - start)
            gate, up = a.gate + t * a.gate_stride + start * 4, a.up + t * a.up_stride + start * 4
            out = a.out + t * a.out_stride + start * 4
            gated_row(activation_id, gate, up, out, n // 16)
            g, u, o = f32_at(gate, n), f32_at(up, n), f32_at(out, n)
            for i in range(n // 16 * 16, n):
                o[i] = _activated(activation_id, g[i]) * u[i]
            if a.q8:
                quantize_row(out, n // 32, a.q8 + t * a.q8_stride + start * 2)

    return gated_rows


@row_op(
    "rows n x x_stride out out_stride q8 q8_stride",
    "alpha_p alpha_n beta eps",
    n_items=lambda a: n_rows(a) * per_row(a),
)
def xielu(a, first, end):
    """models.rare_ops.Xielu. n: columns. Rows have memory for whole vectors of 16 columns. q8: as in gated."""
    for item in range(first, end):
        t, start = item // per_row(a), item % per_row(a) * PIECE
        n, out = min(PIECE, a.n - start), a.out + t * a.out_stride + start * 4
        x = a.x + t * a.x_stride + start * 4
        _xielu_row(x, out, (n + 15) // 16, a.alpha_p, a.alpha_n, a.beta, a.eps)
        if a.q8:
            quantize_row(out, n // 32, a.q8 + t * a.q8_stride + start * 2)
