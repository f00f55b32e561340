"""Layer norm of rows or of equal parts of rows."""

import triton
import triton.language as tl


@triton.jit
def layer_norm(x, x_stride, weight, bias, n, eps, out, out_stride, WIDTH: tl.constexpr):
    """out = (x - mean) / sqrt(variance + eps) * weight (+ bias); grid (rows, parts of n columns), WIDTH >= n."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1) * n
    column = tl.arange(0, WIDTH)
    mask = column < n
    value = tl.load(x + row * x_stride + part + column, mask=mask, other=0.0)
    value = tl.where(mask, value - tl.sum(value, axis=0) / n, 0.0)
    variance = tl.sum(value * value, axis=0) / n
    value = value * (1.0 / tl.sqrt_rn(variance + eps)) * tl.load(weight + part + column, mask=mask, other=0.0)
    if bias is not None:
        value += tl.load(bias + part + column, mask=mask, other=0.0)
    tl.store(out + row * out_stride + part + column, value, mask=mask)
