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
from gguf_run.kernels_cpu.vector.native import f32_at, i64_at
from gguf_run.models.routing import GATINGS, MIN_SUM, NEAR

_SOFTMAX, _SIGMOID, _SPARSEMIXER = (GATINGS.index(name) for name in ("softmax", "sigmoid", "sparsemixer"))


def plan_words(n_expert: int, n_pairs: int) -> int:
    """Return the int64 words of a plan."""
    return 2 * n_expert + 2 + 2 * n_pairs


@njit(inline="always")
def plan_parts(plan, n_expert, n_pairs):
    """Return three parts of a plan: the experts in use, the first pair of each, and the tokens of the pairs."""
    firsts = plan + 8 * (n_expert + 1)
    return i64_at(plan + 8, n_expert), i64_at(firsts, n_expert + 1), i64_at(firsts + 8 * (n_expert + 1), n_pairs)


@njit(inline="always")
def _keep_groups(choice, n_group, n_used, n_best):
    """Set what experts are chosen by to -inf, except in the n_used best of n_group groups: see Mixture."""
    size = len(choice) // n_group
    for _ in range(n_group - n_used):
        worst, least = -1, np.float32(0)
        for g in range(n_group):
            first = second = np.float32(-np.inf)
            for e in range(g * size, (g + 1) * size):
                first, second = max(first, choice[e]), max(second, min(first, choice[e]))
            score = first + second if n_best == 2 else first
            if first > -np.inf and (worst < 0 or score <= least):
                worst, least = g, score
        choice[worst * size : (worst + 1) * size] = -np.inf


@njit(inline="always")
def _almost_softmax(choice, best):
    """Return the score of an expert by "sparsemixer", see GATINGS. Those that are chosen already have -inf."""
    total = 0.0
    for logit in choice:
        if best - logit <= NEAR * max(abs(logit), best):
            total += math.exp(logit - best)
    return 1 / total


@njit(inline="always")
def _scores(a, choice, scores, bias):
    """scores = those of all experts, times a number; return it. choice, the logits, becomes what experts are chosen by.

    choice stays as it is if the scores are in the logits' order: different logits can have equal scores.
    """
    largest, total = choice[0], 0.0
    for e in range(1, a.n_expert):
        largest = max(largest, choice[e])
    for e in range(a.n_expert):
        is_sigmoid = a.gating == _SIGMOID
        scores[e] = 1 / (1 + math.exp(-choice[e])) if is_sigmoid else math.exp(choice[e] - largest)
        total += scores[e]
    times = total if a.gating == _SOFTMAX else 1.0
    if a.bias or a.n_group > 1:
        for e in range(a.n_expert):
            choice[e] = scores[e] / times + (bias[e] if a.bias else np.float32(0))
    return times


@op(
    "rows n_expert n_used norm gating n_group n_group_used n_group_best bias factors logits logits_stride plan weights",
    "scale",
)
def route(args, piece, ith, nth):
    """Choose and weight n_used experts for each token, see Mixture, and write the plan. One thread does this.

    gating: place in GATINGS.
    bias: f32[n_expert], or 0. factors: f32[n_expert], of the weights, or 0.
    logits: overwritten.
    weights: f32[2 * n_pairs + n_expert]: the weights of the pairs, then work space.
    """
    a = carray(args, 1)[0]
    if piece < 0:
        return 1
    n_tokens = i64_at(a.rows, 1)[0]
    n_pairs = n_tokens * a.n_used
    experts, first, tokens = plan_parts(a.plan, a.n_expert, n_pairs)
    chosen = i64_at(a.plan + 8 * (2 * a.n_expert + 2 + n_pairs), n_pairs)
    weights, unsorted = f32_at(a.weights, n_pairs), f32_at(a.weights + 4 * n_pairs, n_pairs)
    scores, bias, factors = f32_at(a.weights + 8 * n_pairs, a.n_expert), f32_at(a.bias, 1), f32_at(a.factors, 1)
    for e in range(a.n_expert + 1):
        first[e] = 0
    for t in range(n_tokens):
        choice = f32_at(a.logits + t * a.logits_stride, a.n_expert)
        times = _scores(a, choice, scores, bias)
        if a.n_group > 1:
            _keep_groups(choice, a.n_group, a.n_group_used, a.n_group_best)
        total = 0.0
        for k in range(t * a.n_used, (t + 1) * a.n_used):
            best = 0
            for e in range(1, a.n_expert):
                if choice[e] > choice[best]:
                    best = e
            value = _almost_softmax(choice, choice[best]) if a.gating == _SPARSEMIXER else scores[best]
            total += value
            chosen[k], unsorted[k] = best, value
            first[best + 1] += 1
            choice[best] = -np.inf
        for k in range(t * a.n_used, (t + 1) * a.n_used):
            unsorted[k] *= a.scale / (max(total, MIN_SUM) if a.norm else times)
            if a.factors:
                unsorted[k] *= factors[chosen[k]]
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


@row_op(
    "rows n_expert n_used plan weights n x x_stride by_pair sums counts kept ends", n_items=lambda a: a.n, grain=COLUMNS
)
def observe_experts(a, first, end):
    """sums[e, i] += the sum of x[t, i]^2 over the tokens t of expert e, i < n; counts[e] += their number.

    by_pair: x has a row for each pair, times the weight of the pair (see moe.py), and the weight is divided out again.
    Else x has a row for each token.
    """
    n_pairs = n_rows(a) * a.n_used
    experts, firsts, token_of = plan_parts(a.plan, a.n_expert, n_pairs)
    weights, counts = f32_at(a.weights, n_pairs), i64_at(a.counts, a.n_expert)
    for i in range(i64_at(a.plan, 1)[0]):
        for p in range(firsts[i], firsts[i + 1]):
            row = p if a.by_pair else token_of[p]
            scale = 1 / np.float64(weights[p]) if a.by_pair and weights[p] else 1.0
            add_squares(a, a.x + row * a.x_stride, scale, experts[i], first, end)
        if first == 0:
            counts[experts[i]] += firsts[i + 1] - firsts[i]
