"""RMS norm and layer norm. RMS norm may add a residual, and write the result as matmul reads it."""

import triton
import triton.language as tl

from gguf_run.kernels_gpu.rows.quantize import store_halves, store_int8


@triton.jit
def normed(value, weight, column, n, eps):
    """Return an RMS norm of a row of n values, 0 beyond."""
    mean = tl.sum(value * value, axis=0) / n
    return value * (1.0 / tl.sqrt_rn(mean + eps)) * tl.load(weight + column, mask=column < n, other=0.0)


@triton.jit
def norm(
    x, x_stride, weight, bias, n, eps, out, out_stride, residual, residual_stride, int8, halves,
    LAYER: tl.constexpr, GROUPED: tl.constexpr, EIGHTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out = x / sqrt(mean(x^2) + eps) * weight (+ bias) (+ residual); grid (rows, parts of n columns), WIDTH >= n.

    LAYER: x - mean(x) takes the place of x. GROUPED: each part has its own part of weight and bias.
    int8: None, or (xq, xd, xs): gets the result as int8. halves: None, or (xh, xm): as f16. Both for one part only.
    EIGHTS: see store_halves, which wants WIDTH to be a multiple of 256.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1) * n
    column = tl.arange(0, WIDTH)
    mask = column < n
    value = tl.load(x + row * x_stride + part + column, mask=mask, other=0.0)
    if LAYER:
        value = tl.where(mask, value - tl.sum(value, axis=0) / n, 0.0)
    if GROUPED:
        weight += part
    value = normed(value, weight, column, n, eps)
    if bias is not None:
        value += tl.load(bias + part + column, mask=mask, other=0.0)
    if residual is not None:
        value += tl.load(residual + row * residual_stride + part + column, mask=mask, other=0.0)
    tl.store(out + row * out_stride + part + column, value, mask=mask)
    if int8 is not None:
        store_int8(value, 0, int8, row, n, WIDTH)
    if halves is not None:
        store_halves(value, column, halves, row, n, EIGHTS)
