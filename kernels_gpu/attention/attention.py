"""Causal attention over a cache: each KV head's positions in parts (split-KV), and a second kernel that adds them up.

A program has the query heads of one KV head for one token or for some, as the rows of one tile for tensor cores. Scores
are in units of log2(e): softmax takes powers of two.
"""

import triton
import triton.language as tl

from gguf_run.kernels_gpu.attention.cache_rows import column_of, load_rows, planes_at, row_factors
from gguf_run.kernels_gpu.rows.hadamard import hadamard
from gguf_run.kernels_gpu.rows.quantize import store_int8

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend(  # type: ignore[no-untyped-def]
    q,
    q_stride,
    k_qs,
    k_d,
    v_qs,
    v_d,
    seqs,
    positions,
    sums,
    stats,
    n_ctx,
    n_head_kv,
    n_rep,
    n_token,
    scale,
    window,
    SOFTCAP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    REP: tl.constexpr,
    SPAN: tl.constexpr,
):
    """sums f32[part, n_token, n_head, HEAD_DIM] = exp2(score - greatest) @ v over a part of the positions that a token
    sees; stats f32[part, n_token, n_head, 2] = (greatest score, sum of exp2(score - greatest)), (-inf, 0) for none.

    Grid (n_token / TOKENS, n_head_kv, parts). Rows of a tile are TOKENS tokens x REP heads, n_rep of which are there.
    SPAN: positions at a time. SOFTCAP: None, or scores become SOFTCAP * tanh(score / SOFTCAP). Tokens of one tile may
    be of several sequences, which it takes one after the other.
    """
    K_PARTS: tl.constexpr = 2 if K == "q4_0" else 1
    V_PARTS: tl.constexpr = 2 if V == "q4_0" else 1
    K_BY_ROW: tl.constexpr = K == "int8" or K == "fp8_e4m3" or K == "fp8_e5m2"
    V_BY_ROW: tl.constexpr = V == "int8" or V == "fp8_e4m3" or V == "fp8_e5m2"
    K_PRECISION: tl.constexpr = "ieee" if K == "f32" else None
    V_PRECISION: tl.constexpr = "ieee" if V == "f32" else None
    M: tl.constexpr = TOKENS * REP
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    r = tl.arange(0, M)
    t = (tl.program_id(0) * TOKENS + r // REP).to(tl.int64)
    there = (t < n_token) & (r % REP < n_rep)
    head = kv_head * n_rep + r % REP
    position = tl.load(positions + t, mask=there, other=-1)
    seq = tl.load(seqs + t, mask=t < n_token, other=0)
    queries = ()
    for i in tl.static_range(K_PARTS):
        column = column_of(tl.arange(0, WIDTH // K_PARTS), i, K)[None, :]
        at = q + t[:, None] * q_stride + head[:, None] * HEAD_DIM + column
        x = tl.load(at, mask=there[:, None] & (column < HEAD_DIM), other=0.0)
        queries = queries + ((x if K == "bf16" or K == "f32" else x.to(tl.float16)),)
    acc = ()
    for _ in tl.static_range(V_PARTS):
        acc = acc + (tl.zeros((M, WIDTH // V_PARTS), tl.float32),)
    greatest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    for s in range(tl.min(seq, axis=0), tl.max(seq, axis=0) + 1):
        mine = there & (seq == s) & (position >= 0)
        end = tl.max(tl.where(mine, position, -1), axis=0) + 1
        first = tl.maximum(tl.min(tl.where(mine, position, 1 << 30), axis=0) - window + 1, 0)
        first = tl.minimum(first, end) // SPAN * SPAN
        size = tl.cdiv(tl.cdiv(end - first, SPAN), tl.num_programs(2)) * SPAN
        first += part * size
        row = (s * n_head_kv + kv_head.to(tl.int64)) * n_ctx
        k_at, kd_at = planes_at(k_qs, k_d, row, K, HEAD_DIM)
        v_at, vd_at = planes_at(v_qs, v_d, row, V, HEAD_DIM)
        slot = first % n_ctx
        for start in range(first, tl.minimum(first + size, end), SPAN):
            p = start + tl.arange(0, SPAN)
            live = p < end
            rows = slot + tl.arange(0, SPAN)  # n_ctx is a multiple of SPAN
            slot = tl.where(slot + SPAN == n_ctx, 0, slot + SPAN)
            keys = load_rows(k_at, kd_at, rows, live, K, HEAD_DIM, WIDTH)
            score = tl.dot(queries[0], tl.trans(keys[0]), input_precision=K_PRECISION)
            if K_PARTS == 2:
                score = tl.dot(queries[1], tl.trans(keys[1]), score)
            score *= scale
            if K_BY_ROW:
                score *= row_factors(kd_at, rows, live, K)[None, :]
            if SOFTCAP is not None:
                score = SOFTCAP * (2 * tl.sigmoid(score * (2 / SOFTCAP)) - 1)
            far = position[:, None] - p[None, :]
            score = tl.where(mine[:, None] & (far >= 0) & (far < window), score * LOG2E, float("-inf"))
            new = tl.maximum(greatest, tl.max(score, axis=1))
            known = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: all weights are 0
            weight = tl.exp2(score - known[:, None])
            old = tl.exp2(greatest - known)
            total = total * old + tl.sum(weight, axis=1)
            greatest = new
            values = load_rows(v_at, vd_at, rows, live, V, HEAD_DIM, WIDTH)
            if V_BY_ROW:  # on the weights; relative to the greatest, so that f16 holds them
                factor = row_factors(vd_at, rows, live, V)
                largest = tl.max(factor, axis=0)
                weight *= (factor / tl.where(largest == 0, 1.0, largest))[None, :]
            if V != "bf16" and V != "f32":
                weight = weight.to(tl.float16)
            added = ()
            for i in tl.static_range(V_PARTS):
                if V_BY_ROW:
                    added = added + (acc[i] * old[:, None] + tl.dot(weight, values[i]) * largest,)
                else:
                    added = added + (tl.dot(weight, values[i], acc[i] * old[:, None], input_precision=V_PRECISION),)
            acc = added
    to = (part.to(tl.int64) * n_token + t) * (n_head_kv * n_rep) + head
    tl.store(stats + to * 2, greatest, mask=there)
    tl.store(stats + to * 2 + 1, total, mask=there)
    for i in tl.static_range(V_PARTS):
        column = column_of(tl.arange(0, WIDTH // V_PARTS), i, V)[None, :]
        tl.store(sums + to[:, None] * HEAD_DIM + column, acc[i], mask=there[:, None] & (column < HEAD_DIM))


@triton.jit
def add_up(  # type: ignore[no-untyped-def]
    sums,
    stats,
    sinks,
    out,
    out_stride,
    xq,
    xd,
    xs,
    PARTS: tl.constexpr,
    ROTATE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """out = what attend's parts add up to; grid (tokens, heads). sinks: None, or a score for each head that has no
    value. xq, not None (with xd, xs), gets the result as int8 (quantize.py); HEAD_DIM is WIDTH then."""
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    n_head = tl.num_programs(1)
    at = (tl.arange(0, PARTS).to(tl.int64) * tl.num_programs(0) + t) * n_head + head
    column = tl.arange(0, WIDTH)
    score = tl.load(stats + at * 2)
    greatest = tl.max(score, axis=0)
    if sinks is not None:
        sink = tl.load(sinks + head) * LOG2E
        greatest = tl.maximum(greatest, sink)
    greatest = tl.where(greatest == float("-inf"), 0.0, greatest)
    weight = tl.exp2(score - greatest)
    total = tl.sum(weight * tl.load(stats + at * 2 + 1), axis=0)
    if sinks is not None:
        total += tl.exp2(sink - greatest)
    mask = (weight > 0)[:, None] & (column < HEAD_DIM)[None, :]
    part = tl.load(sums + at[:, None] * HEAD_DIM + column[None, :], mask=mask, other=0.0)
    value = tl.sum(part * weight[:, None], axis=0) / tl.where(total == 0, 1.0, total)
    if ROTATE:
        value = hadamard(value, HEAD_DIM)
    tl.store(out + t * out_stride + head * HEAD_DIM + column, value, mask=column < HEAD_DIM)
    if xq is not None:
        store_int8(value, head * HEAD_DIM, xq, xd, xs, t, n_head * HEAD_DIM, WIDTH)
