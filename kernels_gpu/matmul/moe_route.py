"""Chooses the experts of each token, and sorts the pairs of a token and one of its experts by expert.

Pair p = t * n_used + k is token t's k-th expert. The host knows no result: kernels are launched for the most work that
there can be, and find their work in device memory.
"""

import triton
import triton.language as tl


@triton.jit
def _keep_groups(choice, group, N_GROUP: tl.constexpr, N_USED: tl.constexpr, N_BEST: tl.constexpr):
    """Return what experts are chosen by, and -inf outside the N_USED best of N_GROUP groups. group: of each expert."""
    left = choice  # the score of the expert's group
    for g in tl.static_range(N_GROUP):
        is_own = group == g
        own = tl.where(is_own, choice, float("-inf"))
        score = tl.max(own, axis=0)
        if N_BEST == 2:
            first = tl.argmax(own, axis=0, tie_break_left=True)
            score += tl.max(tl.where(tl.arange(0, choice.shape[0]) == first, float("-inf"), own), axis=0)
        left = tl.where(is_own, score, left)
    kept = group < 0
    for _ in tl.static_range(N_USED):
        best = tl.min(tl.where(left == tl.max(left, axis=0), group, N_GROUP), axis=0)
        kept = kept | (group == best)
        left = tl.where(group == best, float("-inf"), left)
    return tl.where(kept, choice, float("-inf"))


@triton.jit
def route(
    logits, logits_stride, bias, factors, positions, n_expert, scale, chosen, weights,
    GATING: tl.constexpr, NORM: tl.constexpr, N_GROUP: tl.constexpr, N_GROUP_USED: tl.constexpr,
    N_GROUP_BEST: tl.constexpr, NEAR: tl.constexpr, MIN_SUM: tl.constexpr,
    N_USED: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """chosen int32[p] = a token's experts; weights f32[p], see models.routing.Mixture.

    Grid (tokens,). WIDTH >= n_expert, SLOTS >= N_USED. bias, factors: None, or f32[n_expert]; factors of the weights.
    Of equal experts the first one counts. NaN counts as the least: so all chosen experts exist.
    positions: None, or int32[tokens]: rows of position -1 only fill up, and get the expert -1.
    """
    t = tl.program_id(0)
    e, slot = tl.arange(0, WIDTH), tl.arange(0, SLOTS)
    choice = tl.load(logits + t * logits_stride + e, mask=e < n_expert, other=float("-inf"))
    choice = tl.where(choice == choice, choice, float("-inf"))
    score = tl.sigmoid(choice) if GATING == "sigmoid" else tl.exp(choice - tl.max(choice, axis=0))
    total = tl.sum(score, axis=0) if GATING == "softmax" else 1.0
    if bias is not None or N_GROUP > 1:
        choice = score / total
        if bias is not None:
            choice += tl.load(bias + e, mask=e < n_expert, other=0.0)
        choice = tl.where((e < n_expert) & (choice == choice), choice, float("-inf"))
    if N_GROUP > 1:
        choice = _keep_groups(choice, e // (n_expert // N_GROUP), N_GROUP, N_GROUP_USED, N_GROUP_BEST)
    picked = tl.full((SLOTS,), -1, tl.int32)
    power = tl.zeros((SLOTS,), tl.float32)
    for k in range(N_USED):
        best = tl.max(choice, axis=0)
        where = tl.min(tl.where(choice == best, e, WIDTH), axis=0)
        if GATING == "sparsemixer":
            near = best - choice <= NEAR * tl.maximum(tl.abs(choice), best)
            value = 1.0 / tl.sum(tl.where(near, tl.exp(choice - best), 0.0), axis=0)
        else:
            value = tl.sum(tl.where(e == where, score, 0.0), axis=0)
        picked = tl.where(slot == k, where, picked)
        power = tl.where(slot == k, value, power)
        choice = tl.where(e == where, float("-inf"), choice)
    if NORM:
        total = tl.maximum(tl.sum(power, axis=0), MIN_SUM)
    power *= scale / total
    if factors is not None:
        power *= tl.load(factors + picked, mask=slot < N_USED, other=0.0)
    if positions is not None:
        picked = tl.where(tl.load(positions + t) < 0, -1, picked)
    tl.store(chosen + t * N_USED + slot, picked, mask=slot < N_USED)
    tl.store(weights + t * N_USED + slot, power, mask=slot < N_USED)


@triton.jit
def group(chosen, n_pairs, counts, order, WIDTH: tl.constexpr):
    """counts int32[e] = number of expert e's pairs; order int32[p] = the pairs sorted by expert; grid (n_expert,)."""
    e = tl.program_id(0)
    first = 0
    n = 0
    for start in range(0, n_pairs, WIDTH):
        p = start + tl.arange(0, WIDTH)
        expert = tl.load(chosen + p, mask=p < n_pairs, other=-1)
        first += tl.sum(((expert >= 0) & (expert < e)).to(tl.int32), axis=0)
        n += tl.sum((expert == e).to(tl.int32), axis=0)
    tl.store(counts + e, n)
    if n > 0:
        for start in range(0, n_pairs, WIDTH):
            p = start + tl.arange(0, WIDTH)
            expert = tl.load(chosen + p, mask=p < n_pairs, other=-1)
            is_own = (expert == e).to(tl.int32)
            place = tl.cumsum(is_own, axis=0)
            tl.store(order + first + place - 1, p, mask=expert == e)
            first += tl.sum(is_own, axis=0)


@triton.jit
def observe_experts(
    x, x_stride, counts, order, sums, seen, n_expert, n,
    N_USED: tl.constexpr, EXPERTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """sums f64[e, n] += the squares of the rows that expert e reads; seen int64[e] += the number of these rows.

    Grid (n_expert, n / WIDTH). Pair p reads row p / N_USED of x. EXPERTS >= n_expert.
    """
    e, each = tl.program_id(0), tl.arange(0, EXPERTS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    first = tl.sum(tl.load(counts + each, mask=each < tl.minimum(e, n_expert), other=0), axis=0)
    n_pairs = tl.load(counts + e)
    total = tl.load(sums + e * n + column, mask=column < n)
    for i in range(0, n_pairs):
        row = (tl.load(order + first + i) // N_USED).to(tl.int64)
        value = tl.load(x + row * x_stride + column, mask=column < n).to(tl.float64)
        total += value * value
    tl.store(sums + e * n + column, total, mask=column < n)
    if tl.program_id(1) == 0:
        tl.store(seen + e, tl.load(seen + e) + n_pairs)
