"""out = x / sqrt(mean(x^2) + eps) * weight (+ residual), of rows, or of n_group equal groups of a row's columns."""

import math

import numpy as np

from gguf_run.formats.compiler.deferred import COMPILING
from gguf_run.kernels_cpu.replay.op import n_rows, row_op

if COMPILING:
    from gguf_run.kernels_cpu.rows.quantize import quantize_if_wanted
    from gguf_run.kernels_cpu.vector.native import f32_at


def n_groups(a):
    return n_rows(a) * a.n_group


FASTMATH = {"reassoc", "contract"}  # sums may be taken 16 numbers at a time


@row_op(
    "rows n_group is_grouped n x x_stride weight out out_stride residual residual_stride q8 q8_stride",
    "eps",
    n_items=n_groups,
    fastmath=FASTMATH,
)
def rms_norm(a, first, end):
    """n: width of a group. weight: f32[n], or f32[n_group * n] if is_grouped. residual: rows, or 0.

    q8: int8 form of the rows if n_group is 1, or 0.
    """
    n = a.n
    for item in range(first, end):
        t, start = item // a.n_group, item % a.n_group * n * 4
        x, out = f32_at(a.x + t * a.x_stride + start, n), f32_at(a.out + t * a.out_stride + start, n)
        weight = f32_at(a.weight + start * a.is_grouped, n)
        total = np.float32(0)
        for i in range(n):
            total += x[i] * x[i]
        factor = np.float32(1 / math.sqrt(total / n + a.eps))
        if a.residual:
            residual = f32_at(a.residual + t * a.residual_stride + start, n)
            for i in range(n):
                out[i] = x[i] * factor * weight[i] + residual[i]
        else:
            for i in range(n):
                out[i] = x[i] * factor * weight[i]
        quantize_if_wanted(a.q8, a.q8_stride, t, a.out + t * a.out_stride, n)
