"""out = (x - mean(x)) / sqrt(variance(x) + eps) * weight (+ bias), of rows or of groups of columns as in norms.py."""

import math

import numpy as np

from gguf_run.formats.compiler.deferred import COMPILING
from gguf_run.kernels_cpu.replay.op import row_op
from gguf_run.kernels_cpu.rows.norms import FASTMATH, n_groups

if COMPILING:
    from gguf_run.kernels_cpu.rows.quantize import quantize_if_wanted
    from gguf_run.kernels_cpu.vector.native import f32_at


@row_op("rows n_group n x x_stride weight bias out out_stride q8 q8_stride", "eps", n_items=n_groups, fastmath=FASTMATH)
def layer_norm(a, first, end):
    """n: width of a group. weight: f32[n_group * n]. bias: the same, or 0. q8: as in rms_norm."""
    n = a.n
    for item in range(first, end):
        t, start = item // a.n_group, item % a.n_group * n * 4
        x, out = f32_at(a.x + t * a.x_stride + start, n), f32_at(a.out + t * a.out_stride + start, n)
        weight = f32_at(a.weight + start, n)
        total, squares = np.float32(0), np.float32(0)
        for i in range(n):
            total += x[i]
        mean = np.float32(total / n)
        for i in range(n):
            squares += (x[i] - mean) * (x[i] - mean)
        factor = np.float32(1 / math.sqrt(squares / n + a.eps))
        for i in range(n):
            out[i] = (x[i] - mean) * factor * weight[i]
        if a.bias:
            bias = f32_at(a.bias + start, n)
            for i in range(n):
                out[i] += bias[i]
        quantize_if_wanted(a.q8, a.q8_stride, t, a.out + t * a.out_stride, n)
