"""Attention over split positions: the parts of a row become one result."""

import math

import numpy as np

from gguf_run.formats.compiler.deferred import COMPILING
from gguf_run.kernels_cpu.replay.op import n_rows, row_op
from gguf_run.kernels_cpu.replay.runs import runs_at

if COMPILING:
    from gguf_run.kernels_cpu.attention.hadamard import hadamard
    from gguf_run.kernels_cpu.attention.softmax import LOWEST
    from gguf_run.kernels_cpu.rows.quantize import quantize_if_wanted
    from gguf_run.kernels_cpu.vector.native import f32_at, i64_at


@row_op(
    "rows runs run_of n_head n_head_kv n_value wide v_rotate sinks out out_stride parts part_bytes max_rows "
    "q8 q8_stride"
)
def merge(a, first, end):
    """out = the joined parts of rows whose positions are split. q8: int8 form of all rows of out, or 0."""
    n_tokens, n = n_rows(a), a.n_value
    wide, n_rep = a.wide, a.n_head // a.n_head_kv
    run_of, runs = i64_at(a.run_of, n_tokens), runs_at(a.runs, n_tokens)
    for t in range(first, end):
        run = runs[run_of[t]]
        n_split, t0, per = run.n_split, t - run.first, run.n_per_piece
        for h in range(a.n_head if n_split > 1 else 0):
            row = t0 % per * n_rep + h % n_rep
            part = a.parts + (run.first_part + (t0 // per * a.n_head_kv + h // n_rep) * n_split) * a.part_bytes
            most, total = LOWEST, np.float32(0)
            if a.sinks:
                most, total = f32_at(a.sinks, a.n_head)[h], np.float32(1)
            before = most
            for s in range(n_split):
                state = f32_at(part + s * a.part_bytes + (a.max_rows * wide + row) * 4, a.max_rows + 1)
                most = max(most, state[0])
            total *= np.float32(math.exp(before - most))
            out = f32_at(a.out + t * a.out_stride + h * n * 4, n)
            out[:] = 0
            for s in range(n_split):
                state = f32_at(part + s * a.part_bytes + (a.max_rows * wide + row) * 4, a.max_rows + 1)
                sums = f32_at(part + s * a.part_bytes + row * wide * 4, n)
                weight = np.float32(math.exp(state[0] - most))
                total += weight * state[a.max_rows]
                for i in range(n):
                    out[i] += weight * sums[i]
            for i in range(n):
                out[i] /= total
            if a.v_rotate:
                hadamard(a.out + t * a.out_stride + h * n * 4, n)
        quantize_if_wanted(a.q8, a.q8_stride, t, a.out + t * a.out_stride, a.n_head * n)
