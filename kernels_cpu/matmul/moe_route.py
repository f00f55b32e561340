"""A mixture of experts: the choice of experts for each token, and what is observed of them.

A pair is a token and one of its experts. Pairs are sorted by expert: the weights of an expert are read once for all its
tokens, and the weights of an expert without tokens are not read. `route` writes a plan, int64:

    [1]             number of experts in use
    [n_expert]      their numbers, ascending
    [n_expert + 1]  the first pair of each, and the end
    [n_pairs]       the token of each pair
    [n_pairs]       work space
"""

import math

import numpy as np

from gguf_run.formats.compiler.jit import carray, njit
from gguf_run.kernels_cpu.replay.op import n_rows, op, row_op
from gguf_run.kernels_cpu.rows.observe import COLUMNS, add_squares
from gguf_run.kernels_cpu.vector.native import f32_at, i64_at, pointer


def plan_words(n_expert: int, n_pairs: int) -> int:
    """Return the int64 words of a plan."""
    return 2 * n_expert + 2 + 2 * n_pairs


@njit(inline="always")
def plan_parts(plan, n_expert, n_pairs):
    """Return three parts of a plan: the experts in use, the first pair of each, and the tokens of the pairs."""
    firsts = plan + 8 * (n_expert + 1)
    return i64_at(plan + 8, n_expert), i64_at(firsts, n_expert + 1), i64_at(firsts + 8 * (n_expert + 1), n_pairs)


@op("rows n_expert n_used norm logits logits_stride plan weights", "scale")
def route(args, piece, ith, nth):
    """Choose the n_used experts of the greatest logits for each token, and write the plan. One thread does this.

    norm: the weights are the softmax over the chosen experts, not over all experts.
    scale: factor of all weights.
    weights: f32[2 * n_pairs]: the weights of the pairs, then work space.
    """
    a = carray(args, 1)[0]
    if piece < 0:
        return 1
    n_tokens = i64_at(a.rows, 1)[0]
    n_pairs = n_tokens * a.n_used
    experts, first, tokens = plan_parts(a.plan, a.n_expert, n_pairs)
    chosen = i64_at(a.plan + 8 * (2 * a.n_expert + 2 + n_pairs), n_pairs)
    weights, unsorted = f32_at(a.weights, n_pairs), f32_at(a.weights + 4 * n_pairs, n_pairs)
    for e in range(a.n_expert + 1):
        first[e] = 0
    for t in range(n_tokens):
        logits = f32_at(a.logits + t * a.logits_stride, a.n_expert)
        largest, total = logits[0], 0.0
        for e in range(1, a.n_expert):
            largest = max(largest, logits[e])
        if not a.norm:
            for e in range(a.n_expert):
                total += math.exp(logits[e] - largest)
        for k in range(t * a.n_used, (t + 1) * a.n_used):
            best = 0
            for e in range(1, a.n_expert):
                if logits[e] > logits[best]:
                    best = e
            value = math.exp(logits[best] - largest)
            total += value if a.norm else 0.0
            chosen[k], unsorted[k] = best, value
            first[best + 1] += 1
            logits[best] = -np.inf
        for k in range(t * a.n_used, (t + 1) * a.n_used):
            unsorted[k] *= a.scale / total
    for e in range(a.n_expert):
        first[e + 1] += first[e]
    for k in range(n_pairs):  # after this loop, first[e] is the end of expert e
        p = first[chosen[k]]
        first[chosen[k]] += 1
        tokens[p], weights[p] = k // a.n_used, unsorted[k]
    n_active = start = 0
    for e in range(a.n_expert):  # n_active <= e: first[n_active] has been read before it is overwritten
        end = first[e]
        if end > start:
            experts[n_active], first[n_active] = e, start
            n_active += 1
        start = end
    first[n_active] = n_pairs
    i64_at(a.plan, 1)[0] = n_active
    return 0


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
