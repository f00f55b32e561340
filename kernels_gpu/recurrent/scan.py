"""The state space of Mamba 2 (models.rare_ops.Scan), token by token. The state of a program stays in registers."""

import triton
import triton.language as tl
from torch import Tensor as Array

from gguf_run.kernels_gpu.buffers import Launch, Memory
from gguf_run.kernels_gpu.recurrent.runs import TILE, load_run, softplus
from gguf_run.kernels_gpu.recurrent.state import GpuState
from gguf_run.models.rare_ops import Scan


@triton.jit
def scan(
    x, x_stride, b, b_stride, c, c_stride, dt, dt_stride, dt_bias, a, d, state, runs, out, out_stride,
    n_group, head_dim, n_state, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Grid (runs, heads, parts of P columns of a head). state: f32[slots, heads, head_dim, n_state]."""
    first, n_tokens, is_new, reads, writes = load_run(runs)
    if n_tokens == 0:
        return
    head, n_head = tl.program_id(1), tl.num_programs(1)
    i = tl.arange(0, N)
    column = tl.program_id(2) * P + tl.arange(0, P)
    at = (head * head_dim + column[:, None]) * n_state + i[None, :]
    mask = (column < head_dim)[:, None] & (i < n_state)[None, :]
    size = n_head * head_dim * n_state
    s = tl.load(state + reads * size + at, mask=mask & ~is_new, other=0.0)
    rate, shift, skip = tl.load(a + head), tl.load(dt_bias + head), tl.load(d + head)
    x += head * head_dim + column
    out += head * head_dim + column
    in_group = head // (n_head // n_group) * n_state + i
    for t in range(first, first + n_tokens):
        delta = softplus(tl.load(dt + t * dt_stride + head) + shift)
        value = tl.load(x + t * x_stride, mask=column < head_dim, other=0.0)
        entry = tl.load(b + t * b_stride + in_group, mask=i < n_state, other=0.0)
        exit = tl.load(c + t * c_stride + in_group, mask=i < n_state, other=0.0)
        s = s * tl.exp(delta * rate) + (value * delta)[:, None] * entry[None, :]
        result = tl.sum(s * exit[None, :], axis=1) + skip * value
        tl.debug_barrier()  # other threads have read what is written now: out may be x
        tl.store(out + t * out_stride, result, mask=column < head_dim)
    tl.store(state + writes * size + at, s, mask=mask)


def bind_scan(op: Scan[GpuState, Array], memory: Memory) -> Launch:
    inputs = [part for x in (op.x, op.b, op.c, op.dt) for part in memory.strided(x)]
    step, out, head_dim, n_state = (
        memory.step,
        memory.strided(op.out),
        op.x.width // op.n_head,
        op.b.width // op.n_group,
    )
    columns = triton.next_power_of_2(n_state)
    rows = min(max(1, TILE // columns), triton.next_power_of_2(head_dim))
    return lambda n: scan[(step.n_run(n), op.n_head, -(-head_dim // rows))](
        *inputs, op.dt_bias, op.a, op.d, op.state.data, step.runs, *out, op.n_group, head_dim, n_state,
        rows, columns, num_warps=1,
    )  # fmt: skip
