"""The state space of Mamba 2 (models.rare_ops.Scan), token by token.

The columns of a head are cut into blocks of 16, the last one may be narrower. A piece of work is one block for one
sequence, with all its tokens. The state of a block is f32[n_state, columns]: it stays in the L1 cache, and its sums
grow side by side. The chunked form, as products of matrices, would take 0.9 times the operations at best.
"""

import math

import numpy as np

from gguf_run.formats.compiler.jit import njit
from gguf_run.kernels_cpu.replay.op import n_rows, row_op
from gguf_run.kernels_cpu.replay.runs import runs_at
from gguf_run.kernels_cpu.vector.lowering import simd_kernel
from gguf_run.kernels_cpu.vector.native import f32_at, i64_at
from gguf_run.kernels_cpu.vector.simd import F32, Simd, Val

LANES = 16  # columns of a block
_UNROLLED = 4  # rows of the state, each with its own sum: one sum would wait for itself


@row_op("rows dt dt_stride dt_bias a n_head steps")
def scan_steps(a, first, end):
    """steps[t, head] = (delta, exp(delta * a)). steps: f32[n_tokens, n_head, 2]."""
    bias, decay = f32_at(a.dt_bias, a.n_head), f32_at(a.a, a.n_head)
    for t in range(first, end):
        dt, steps = f32_at(a.dt + t * a.dt_stride, a.n_head), f32_at(a.steps + t * a.n_head * 8, a.n_head * 2)
        for i in range(a.n_head):
            x = np.float64(dt[i]) + bias[i]
            delta = x if x > 20 else math.log1p(math.exp(x))
            steps[2 * i] = delta
            steps[2 * i + 1] = math.exp(delta * decay[i])


@simd_kernel(floats="delta decay d")
def _advance(
    s: Simd, old: Val, new: Val, b: Val, c: Val, x: Val, out: Val, n_state: Val, delta: Val, decay: Val, d: Val
) -> None:
    """One token of a block of 16 columns: new = decay * old + b * delta * x, then out = c * new + d * x."""
    value, kept = s.load(x, F32, LANES), s.splat(decay, LANES)
    added = value * s.splat(delta, LANES)

    def row(at: Val, total: Val) -> Val:
        state = s.fma(s.load(b + at * 4, F32, splat=LANES), added, s.load(old + at * (4 * LANES), F32, LANES) * kept)
        s.store(state, new + at * (4 * LANES))
        return s.fma(s.load(c + at * 4, F32, splat=LANES), state, total)

    def rows(i: Val, sums: list[Val]) -> list[Val]:
        return [row(i * _UNROLLED + j, total) for j, total in enumerate(sums)]

    n_whole = (n_state >> 2) << 2
    sums = s.loop(n_state >> 2, [value * s.splat(d, LANES), *[s.const(F32, 0.0, LANES)] * (_UNROLLED - 1)], rows)
    rest = s.loop(n_state - n_whole, [sums[0]], lambda i, total: [row(n_whole + i, total[0])])
    s.store((rest[0] + sums[1]) + (sums[2] + sums[3]), out)


@njit(inline="always")
def _advance_narrow(old, new, b, c, x, out, n_state, delta, decay, d, n):
    """As _advance, for a block of n columns."""
    old, new, b, c = f32_at(old, n_state * n), f32_at(new, n_state * n), f32_at(b, n_state), f32_at(c, n_state)
    x, out = f32_at(x, n), f32_at(out, n)
    for j in range(n):
        value, total = x[j], d * x[j]
        for i in range(n_state):
            state = decay * old[i * n + j] + b[i] * (delta * value)
            new[i * n + j] = state
            total += c[i] * state
        out[j] = total


@njit(inline="always")
def _blocks(a):
    """The blocks of a head."""
    return (a.head_dim + LANES - 1) // LANES


@row_op(
    "rows x x_stride b b_stride c c_stride out out_stride d state slot_bytes steps runs n_runs n_head n_group head_dim"
    " n_state",
    n_items=lambda a: i64_at(a.n_runs, 1)[0] * a.n_head * _blocks(a),
)
def scan(a, first, end):
    """state: f32[n_slots, n_head, blocks of a head, n_state, columns of a block]."""
    runs, d = runs_at(a.runs, n_rows(a)), f32_at(a.d, a.n_head)
    for item in range(first, end):
        block, head, run = item % _blocks(a), item // _blocks(a) % a.n_head, runs[item // _blocks(a) // a.n_head]
        n, column = min(LANES, a.head_dim - block * LANES), (head * a.head_dim + block * LANES) * 4
        group = head // (a.n_head // a.n_group) * a.n_state * 4
        new = a.state + run.writes * a.slot_bytes + column * a.n_state
        old = a.state + run.reads * a.slot_bytes + column * a.n_state
        if run.n_past == 0:
            f32_at(new, n * a.n_state)[:] = 0
            old = new
        for t in range(run.first, run.first + run.n_tokens):
            step = f32_at(a.steps + (t * a.n_head + head) * 8, 2)
            b, c = a.b + t * a.b_stride + group, a.c + t * a.c_stride + group
            x, out = a.x + t * a.x_stride + column, a.out + t * a.out_stride + column
            if n == LANES:
                _advance(old, new, b, c, x, out, a.n_state, step[0], step[1], d[head])
            else:
                _advance_narrow(old, new, b, c, x, out, a.n_state, step[0], step[1], d[head], n)
            old = new
