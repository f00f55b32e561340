"""The short convolution of recurrent layers (models.rare_ops.ShortConv)."""

import triton
import triton.language as tl
from torch import Tensor as Array

from gguf_run.kernels_gpu.buffers import Launch, Memory
from gguf_run.kernels_gpu.recurrent.runs import load_run
from gguf_run.kernels_gpu.recurrent.state import GpuState
from gguf_run.models.rare_ops import ShortConv

_WIDTH = 64  # channels of a program


@triton.jit
def _rows(x, x_stride, old, n, t, n_tokens, is_new, mask, TAPS: tl.constexpr):
    """Return rows t of a run: of x, or of the state before it for t < 0."""
    value = tl.load(x + t * x_stride, mask=mask & (t >= 0) & (t < n_tokens), other=0.0)
    return value + tl.load(old + (t + TAPS - 1) * n, mask=mask & (t < 0) & ~is_new, other=0.0)


@triton.jit
def short_conv(
    x, x_stride, taps, bias, state, runs, out, out_stride, n,
    ACTIVATION: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid (runs, n / WIDTH). ROWS tokens at a time, the last ones first: out may be x, whose rows later ones read.

    state: f32[slots, TAPS - 1, n].
    """
    first, n_tokens, is_new, reads, writes = load_run(runs)
    if n_tokens == 0:
        return
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    mask = column < n
    x += first * x_stride + column
    out += first * out_stride + column
    old = state + reads * (TAPS - 1) * n + column
    new = state + writes * (TAPS - 1) * n + column
    for j in tl.static_range(TAPS - 1):
        last = n_tokens - (TAPS - 1) + j + tl.arange(0, 1)[:, None]
        tl.store(new + j * n, _rows(x, x_stride, old, n, last, n_tokens, is_new, mask, TAPS), mask=mask)
    n_tile = tl.cdiv(n_tokens, ROWS)
    for i in range(0, n_tile):
        t = (n_tile - 1 - i) * ROWS + tl.arange(0, ROWS)[:, None]
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        if bias is not None:
            total += tl.load(bias + column, mask=mask, other=0.0)
        for j in tl.static_range(TAPS):
            rows = _rows(x, x_stride, old, n, t - (TAPS - 1) + j, n_tokens, is_new, mask, TAPS)
            total += rows * tl.load(taps + column * TAPS + j, mask=mask, other=0.0)
        if ACTIVATION == "silu":
            total *= tl.sigmoid(total)
        tl.debug_barrier()  # other threads have read what is written now
        tl.store(out + t * out_stride, total, mask=mask & (t < n_tokens))


def bind_short_conv(op: ShortConv[GpuState, Array], memory: Memory) -> Launch:
    x, out, step, n = memory.strided(op.x), memory.strided(op.out), memory.step, op.x.width
    return lambda n_row: short_conv[(step.n_run(n_row), -(-n // _WIDTH))](
        *x, op.taps, op.bias, op.state.data, step.runs, *out, n, op.activation, op.n_taps,
        32 if step.is_wide[False] else 8, _WIDTH,
    )  # fmt: skip
