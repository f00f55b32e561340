"""What models with several streams of hidden states do to rows (AltUp): mixed parts, matched sizes, sparse rows."""

import math

import numpy as np

from gguf_run.kernels_cpu.replay.op import row_op
from gguf_run.kernels_cpu.rows.norms import FASTMATH
from gguf_run.kernels_cpu.vector.native import f32_at


@row_op("rows n n_x n_out base base_stride x x_stride minus minus_stride coef coef_stride out out_stride", "shift")
def mix(a, first, end):
    """See models.rare_ops.Mix. n: columns of a part. n_x, n_out: parts of x and of out. minus, coef: rows, or 0."""
    n = a.n
    for item in range(first, end):
        coef = f32_at(a.coef + item * a.coef_stride, a.n_x * a.n_out)
        minus = f32_at(a.minus + item * a.minus_stride, n)
        for i in range(a.n_out):
            base = f32_at(a.base + item * a.base_stride + i * n * 4, n)
            out = f32_at(a.out + item * a.out_stride + i * n * 4, n)
            for k in range(n):
                out[k] = base[k]
            for j in range(a.n_x):
                x = f32_at(a.x + item * a.x_stride + j * n * 4, n)
                factor = np.float32(a.shift + (coef[a.n_x * i + j] if a.coef else 0.0))
                for k in range(n):
                    out[k] += factor * (x[k] - minus[k]) if a.minus else factor * x[k]


@row_op("rows n n_part x x_stride like like_stride", "least", fastmath=FASTMATH)
def match_rms(a, first, end):
    """See models.rare_ops.MatchRms. n: columns of a part."""
    n = a.n
    for t in range(first, end):
        like, wanted = f32_at(a.like + t * a.like_stride, n), np.float32(0)
        for k in range(n):
            wanted += like[k] * like[k]
        for i in range(a.n_part):
            x, total = f32_at(a.x + t * a.x_stride + i * n * 4, n), np.float32(0)
            for k in range(n):
                total += x[k] * x[k]
            factor = np.float32(math.sqrt(wanted / max(total, a.least * n)))
            for k in range(n):
                x[k] *= factor


@row_op("rows n x x_stride", "factor", fastmath=FASTMATH)
def threshold(a, first, end):
    """See models.rare_ops.Threshold."""
    n = a.n
    for t in range(first, end):
        x, total, squares = f32_at(a.x + t * a.x_stride, n), np.float32(0), np.float32(0)
        for k in range(n):
            total += x[k]
        mean = total / np.float32(n)
        for k in range(n):
            squares += (x[k] - mean) * (x[k] - mean)
        least = np.float32(mean + a.factor * math.sqrt(squares / n))
        for k in range(n):
            x[k] = max(x[k] - least, np.float32(0))
