"""Rotary position embedding: a table of cosines and sines for the tokens of a step, and the rotation."""

import math

import numpy as np

from gguf_run.formats.compiler.deferred import COMPILING
from gguf_run.formats.compiler.jit import carray, njit
from gguf_run.kernels_cpu.replay.op import n_rows, row_op
from gguf_run.kernels_cpu.replay.runs import runs_at

if COMPILING:
    from gguf_run.kernels_cpu.vector.native import f32_at, i64_at, pointer

_HEADS = 32  # heads that a thread takes at a time, or more


@row_op("rows positions run_of runs n_half inv_freq table", "scale")
def angles(a, first, end):
    """table[t, i] = scale * (cos, sin) of positions[t] * inv_freq[is_long, i].

    inv_freq: f64[2, n_half]. is_long: of the token's run. table: f32[n_tokens, n_half, 2].
    """
    n_tokens = n_rows(a)
    positions, run_of, runs = i64_at(a.positions, n_tokens), i64_at(a.run_of, n_tokens), runs_at(a.runs, n_tokens)
    inv_freq = carray(pointer(a.inv_freq), 2 * a.n_half, np.float64)
    table = f32_at(a.table, n_tokens * a.n_half * 2)
    for t in range(first, end):
        at = runs[run_of[t]].is_long * a.n_half
        for i in range(a.n_half):
            angle = positions[t] * inv_freq[at + i]
            table[(t * a.n_half + i) * 2] = a.scale * math.cos(angle)
            table[(t * a.n_half + i) * 2 + 1] = a.scale * math.sin(angle)


@njit(inline="always")
def _rotate(x, table, n_half, step, apart):
    """Rotate n_half pairs of numbers. Pair i is x[i * step] and x[i * step + apart]."""
    for i in range(n_half):
        c, s = table[2 * i], table[2 * i + 1]
        first, second = x[i * step], x[i * step + apart]
        x[i * step] = first * c - second * s
        x[i * step + apart] = first * s + second * c


@row_op("rows n_head head_dim n_half neox x x_stride table", n_items=lambda a: n_rows(a) * a.n_head, grain=_HEADS)
def rope(a, first, end):
    """Rotate the first 2 * n_half columns of each head. Pairs are (i, i + n_half) if neox, else (2i, 2i + 1)."""
    for item in range(first, end):
        t, head = item // a.n_head, item % a.n_head
        x = f32_at(a.x + t * a.x_stride + head * a.head_dim * 4, 2 * a.n_half)
        table = f32_at(a.table + t * a.n_half * 8, 2 * a.n_half)
        if a.neox:
            _rotate(x, table, a.n_half, 1, a.n_half)
        else:
            _rotate(x, table, a.n_half, 2, 1)
