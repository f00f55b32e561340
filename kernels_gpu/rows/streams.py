"""What models with several streams of hidden states do to rows (AltUp): mixed parts, matched sizes, sparse rows."""

import triton
import triton.language as tl

from gguf_run.kernels_gpu.rows.activation import place


@triton.jit
def mix(
    base, base_stride, x, x_stride, minus, minus_stride, coef, coef_stride, out, out_stride, n, shift,
    N_X: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """See models.rare_ops.Mix; grid (rows, n / WIDTH, parts of out). n: of a part. minus, coef: rows, or None."""
    t, column, mask = place(n, WIDTH)
    i = tl.program_id(2)
    total = tl.load(base + t * base_stride + i * n + column, mask=mask)
    for j in tl.static_range(N_X):
        value = tl.load(x + t * x_stride + j * n + column, mask=mask)
        if minus is not None:
            value -= tl.load(minus + t * minus_stride + column, mask=mask)
        factor = shift
        if coef is not None:
            factor += tl.load(coef + t * coef_stride + N_X * i + j)
        total += factor * value
    tl.store(out + t * out_stride + i * n + column, total, mask=mask)


@triton.jit
def match_rms(x, x_stride, like, like_stride, n, least, WIDTH: tl.constexpr):
    """See models.rare_ops.MatchRms; grid (rows, parts of x), WIDTH >= n."""
    t = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    at = x + t * x_stride + tl.program_id(1) * n + column
    value = tl.load(at, mask=column < n, other=0.0)
    wanted = tl.load(like + t * like_stride + column, mask=column < n, other=0.0)
    total = tl.maximum(tl.sum(value * value, axis=0), least * n)
    tl.store(at, value * tl.sqrt(tl.sum(wanted * wanted, axis=0) / total), mask=column < n)


@triton.jit
def threshold(x, x_stride, n, factor, WIDTH: tl.constexpr):
    """See models.rare_ops.Threshold; grid (rows,), WIDTH >= n."""
    column = tl.arange(0, WIDTH)
    at = x + tl.program_id(0).to(tl.int64) * x_stride + column
    value = tl.load(at, mask=column < n, other=0.0)
    mean = tl.sum(value, axis=0) / n
    apart = tl.where(column < n, value - mean, 0.0)
    least = mean + factor * tl.sqrt(tl.sum(apart * apart, axis=0) / n)
    tl.store(at, tl.maximum(value - least, 0.0), mask=column < n)
