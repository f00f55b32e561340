"""Causal attention over an f16 cache: one program for a token and a head.

The cache of a layer is f16[n_seq][n_ctx][n_head_kv][head_dim], once for K and once for V; position p of a sequence
stands in row p % n_ctx.
"""

import triton
import triton.language as tl


@triton.jit
def append(  # type: ignore[no-untyped-def]
    k, k_stride, v, v_stride, cache_k, cache_v, seqs, positions, n_ctx, n, WIDTH: tl.constexpr
):
    """The tokens' rows of k and v go into the cache; grid (tokens, n / WIDTH)."""
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    position = tl.load(positions + t)
    mask = (column < n) & (position >= 0)
    to = (tl.load(seqs + t).to(tl.int64) * n_ctx + tl.maximum(position, 0) % n_ctx) * n + column
    tl.store(cache_k + to, tl.load(k + t * k_stride + column, mask=mask).to(tl.float16), mask=mask)
    tl.store(cache_v + to, tl.load(v + t * v_stride + column, mask=mask).to(tl.float16), mask=mask)


@triton.jit
def attend(  # type: ignore[no-untyped-def]
    q,
    q_stride,
    cache_k,
    cache_v,
    seqs,
    positions,
    sinks,
    out,
    out_stride,
    n_ctx,
    n_head_kv,
    n_rep,
    head_dim,
    scale,
    window,
    SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
):
    """out = softmax(scale * q.k) @ v over the positions that a token sees; grid (tokens, heads).

    n_rep: heads that share a KV head. sinks: None, or a score for each head that has no value. SOFTCAP: None, or
    scores become SOFTCAP * tanh(score / SOFTCAP). SPAN: positions at a time. The greatest score so far is kept, and
    what was summed with an earlier one is scaled down.
    """
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(positions + t)
    seq = tl.load(seqs + t).to(tl.int64)
    i = tl.arange(0, WIDTH)
    mask = i < head_dim
    query = tl.load(q + t * q_stride + head * head_dim + i, mask=mask, other=0.0) * scale
    greatest = float("-inf")
    total = 0.0
    if sinks is not None:
        greatest = tl.load(sinks + head)
        total = 1.0
    acc = tl.zeros((WIDTH,), tl.float32)
    first = tl.maximum(position - window + 1, 0)
    for start in range(first // SPAN * SPAN, position + 1, SPAN):
        p = start + tl.arange(0, SPAN)
        seen = (p >= first) & (p <= position)
        row = ((seq * n_ctx + p % n_ctx) * n_head_kv + head // n_rep) * head_dim
        load = seen[:, None] & mask[None, :]
        key = tl.load(cache_k + row[:, None] + i[None, :], mask=load, other=0.0).to(tl.float32)
        value = tl.load(cache_v + row[:, None] + i[None, :], mask=load, other=0.0).to(tl.float32)
        score = tl.sum(query[None, :] * key, axis=1)
        if SOFTCAP is not None:
            score = SOFTCAP * (2 * tl.sigmoid(score * (2 / SOFTCAP)) - 1)
        score = tl.where(seen, score, float("-inf"))
        new = tl.maximum(greatest, tl.max(score, axis=0))
        weight = tl.exp(score - new)
        old = tl.exp(greatest - new)
        total = total * old + tl.sum(weight, axis=0)
        acc = acc * old + tl.sum(weight[:, None] * value, axis=0)
        greatest = new
    tl.store(out + t * out_stride + head * head_dim + i, acc / total, mask=mask)
