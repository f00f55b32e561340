"""sums += x^2, column by column, for each expert by itself: see rows/observe.py."""

import numpy as np

from gguf_run.formats.compiler.jit import carray
from gguf_run.kernels_cpu.matmul.moe import plan_parts
from gguf_run.kernels_cpu.replay.op import n_rows, row_op
from gguf_run.kernels_cpu.rows.observe import COLUMNS, add_squares
from gguf_run.kernels_cpu.vector.native import f32_at, i64_at, pointer


@row_op("rows n_expert n_used plan weights n x x_stride by_pair sums counts", n_items=lambda a: a.n, grain=COLUMNS)
def observe_experts(a, first, end):
    """sums[e, i] += the sum of x[t, i]^2 over the tokens t of expert e, i < n; counts[e] += their number.

    by_pair: x has a row for each pair, times the weight of the pair (see moe.py), and the weight is divided out again.
    Else x has a row for each token.
    """
    n_pairs = n_rows(a) * a.n_used
    experts, firsts, token_of = plan_parts(a.plan, a.n_expert, n_pairs)
    weights, counts = f32_at(a.weights, n_pairs), i64_at(a.counts, a.n_expert)
    for i in range(i64_at(a.plan, 1)[0]):
        sums = carray(pointer(a.sums + 8 * (experts[i] * a.n + first)), end - first, np.float64)
        for p in range(firsts[i], firsts[i + 1]):
            row = p if a.by_pair else token_of[p]
            scale = 1 / np.float64(weights[p]) if a.by_pair and weights[p] else 1.0
            add_squares(sums, f32_at(a.x + row * a.x_stride + 4 * first, end - first), scale, end - first)
        if first == 0:
            counts[experts[i]] += firsts[i + 1] - firsts[i]
