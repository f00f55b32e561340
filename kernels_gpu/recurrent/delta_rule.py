"""The gated delta rule (models.rare_ops.DeltaRule), token by token. The state of a program stays in registers."""

import triton
import triton.language as tl
from torch import Tensor as Array

from gguf_run.kernels_gpu.buffers import Launch, Memory
from gguf_run.kernels_gpu.recurrent.runs import TILE, load_run, softplus
from gguf_run.kernels_gpu.recurrent.state import GpuState
from gguf_run.models.rare_ops import DeltaRule


@triton.jit
def delta_rule(
    q, q_stride, k, k_stride, v, v_stride, alpha, alpha_stride, beta, beta_stride, a, dt, state, runs, out, out_stride,
    n_head_k, d_k, d_v, eps, TILED: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Grid (runs, heads of v, parts of V columns of a head). state: f32[slots, heads of v, d_k, d_v]."""
    first, n_tokens, is_new, reads, writes = load_run(runs)
    if n_tokens == 0:
        return
    head, n_head_v = tl.program_id(1), tl.num_programs(1)
    key_head = head % n_head_k if TILED else head // (n_head_v // n_head_k)
    i = tl.arange(0, K)
    column = tl.program_id(2) * V + tl.arange(0, V)
    at = head * d_k * d_v + i[:, None] * d_v + column[None, :]
    mask = (i < d_k)[:, None] & (column < d_v)[None, :]
    size = n_head_v * d_k * d_v
    s = tl.load(state + reads * size + at, mask=mask & ~is_new, other=0.0)
    rate, shift = tl.load(a + head), tl.load(dt + head)
    for t in range(first, first + n_tokens):
        key = tl.load(k + t * k_stride + key_head * d_k + i, mask=i < d_k, other=0.0)
        query = tl.load(q + t * q_stride + key_head * d_k + i, mask=i < d_k, other=0.0)
        value = tl.load(v + t * v_stride + head * d_v + column, mask=column < d_v, other=0.0)
        decay = tl.exp(rate * softplus(tl.load(alpha + t * alpha_stride + head) + shift))
        write = tl.sigmoid(tl.load(beta + t * beta_stride + head))
        key /= tl.sqrt_rn(tl.sum(key * key, axis=0) + eps)
        query /= tl.sqrt_rn((tl.sum(query * query, axis=0) + eps) * d_k)
        s *= decay
        change = (value - tl.sum(s * key[:, None], axis=0)) * write
        s += key[:, None] * change[None, :]
        tl.debug_barrier()  # other threads have read what is written now: out may be v
        tl.store(out + t * out_stride + head * d_v + column, tl.sum(s * query[:, None], axis=0), mask=column < d_v)
    tl.store(state + writes * size + at, s, mask=mask)


def bind_delta_rule(op: DeltaRule[GpuState, Array], memory: Memory) -> Launch:
    inputs = [part for x in (op.q, op.k, op.v, op.alpha, op.beta) for part in memory.strided(x)]
    step, out, d_k, d_v = memory.step, memory.strided(op.out), op.k.width // op.n_head_k, op.v.width // op.n_head_v
    rows = triton.next_power_of_2(d_k)
    columns = min(max(1, TILE // rows), triton.next_power_of_2(d_v))
    return lambda n: delta_rule[(step.n_run(n), op.n_head_v, -(-d_v // columns))](
        *inputs, op.a, op.dt, op.state.data, step.runs, *out, op.n_head_k, d_k, d_v, op.eps, op.is_tiled,
        rows, columns, num_warps=1,
    )  # fmt: skip
