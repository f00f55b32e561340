"""Rows are changed in place: scaled, gated, or moved by what belongs to their position or their sequence."""

import math

import numpy as np

from gguf_run.kernels_cpu.replay.op import n_rows, row_op
from gguf_run.kernels_cpu.replay.runs import runs_at
from gguf_run.kernels_cpu.rows.activation import PIECE, per_row
from gguf_run.kernels_cpu.vector.lowering import simd_kernel
from gguf_run.kernels_cpu.vector.native import f32_at, i64_at
from gguf_run.kernels_cpu.vector.simd import F32, Simd, Val


@simd_kernel(floats="factor cap")
def _cap(s: Simd, x: Val, n_vectors: Val, factor: Val, cap: Val) -> None:
    """x = cap * tanh(factor * x), 16 columns at a time: tanh(y) = 1 - 2 / (1 + e^2y)."""
    twice, high = (s.splat(value, 16) for value in (factor * 2.0, cap))

    def body(i: Val) -> None:
        at = x + i * 64
        s.store(high - high * 2.0 / (s.exp(s.load(at, F32, 16) * twice) + 1.0), at)

    s.each(n_vectors, body)


@row_op("rows n x x_stride", "scale cap", n_items=lambda a: n_rows(a) * per_row(a), grain=8)
def softcap(a, first, end):
    """x = cap * tanh(scale * x / cap), or scale * x if cap is 0. Rows have memory for whole vectors of 16 columns."""
    for item in range(first, end):
        start = item % per_row(a) * PIECE
        n, at = min(PIECE, a.n - start), a.x + item // per_row(a) * a.x_stride + start * 4
        if a.cap:
            _cap(at, (n + 15) // 16, a.scale / a.cap, a.cap)
        else:
            x = f32_at(at, n)
            for i in range(n):
                x[i] *= a.scale


@row_op("rows n x x_stride gate gate_stride", grain=4)
def gate_rows(a, first, end):
    """x[t] *= sigmoid(gate[t, 0])."""
    for t in range(first, end):
        x, factor = f32_at(a.x + t * a.x_stride, a.n), 1 / (1 + math.exp(-f32_at(a.gate + t * a.gate_stride, 1)[0]))
        for i in range(a.n):
            x[i] *= factor


@row_op("rows positions n x x_stride length offset", "scale", grain=4)
def temper(a, first, end):
    """x[t] *= 1 + scale * ln(1 + floor((positions[t] + offset) / length))."""
    positions = i64_at(a.positions, n_rows(a))
    for t in range(first, end):
        x, factor = f32_at(a.x + t * a.x_stride, a.n), 1 + a.scale * math.log(1 + (positions[t] + a.offset) // a.length)
        if factor != 1:
            for i in range(a.n):
                x[i] *= factor


@row_op("rows positions n n_row x x_stride table", grain=4)
def add_positions(a, first, end):
    """x[t] += table[min(positions[t], n_row - 1)]."""
    positions = i64_at(a.positions, n_rows(a))
    for t in range(first, end):
        x, row = f32_at(a.x + t * a.x_stride, a.n), f32_at(a.table + min(positions[t], a.n_row - 1) * a.n * 4, a.n)
        for i in range(a.n):
            x[i] += row[i]


@row_op("rows run_of runs n_runs n n_adapter x x_stride values adapters factors")
def scale_adapters(a, first, end):
    """See models.rare_ops.ScaleAdapters. values: f32[n_seq, n_adapter]. adapters, factors: of each column."""
    run_of, runs = i64_at(a.run_of, n_rows(a)), runs_at(a.runs, i64_at(a.n_runs, 1)[0])
    adapters, factors = i64_at(a.adapters, a.n), f32_at(a.factors, a.n)
    for t in range(first, end):
        x = f32_at(a.x + t * a.x_stride, a.n)
        scales = f32_at(a.values + runs[run_of[t]].seq * a.n_adapter * 4, a.n_adapter)
        for i in range(a.n):
            scale = scales[adapters[i]]
            x[i] = x[i] * (scale * factors[i]) if scale != 0 else np.float32(0)


@row_op("rows n out out_stride", grain=4)
def clear(a, first, end):
    """out = 0"""
    for t in range(first, end):
        f32_at(a.out + t * a.out_stride, a.n)[:] = 0


@row_op("rows n_head n_copied x x_stride x_head out out_stride out_head")
def copy_columns(a, first, end):
    """out = n_copied columns of each head of x. x_head, out_head: bytes from one head to the next."""
    for t in range(first, end):
        for head in range(a.n_head):
            source = f32_at(a.x + t * a.x_stride + head * a.x_head, a.n_copied)
            out = f32_at(a.out + t * a.out_stride + head * a.out_head, a.n_copied)
            for i in range(a.n_copied):
                out[i] = source[i]
