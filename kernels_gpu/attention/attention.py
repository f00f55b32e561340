"""Attention over a cache: each KV head's positions in parts (split-KV), and a second kernel that adds them up.

The host lists the work as items (tables.Items): some tokens of one sequence, and a part of the positions they see.
A program has an item and the query heads of one KV head: the rows of one tile for tensor cores.
Scores are multiplied with log2(e): softmax takes powers of two.
"""

import triton
import triton.language as tl

from gguf_run.kernels_gpu.attention.cache_rows import (
    column_of,
    hadamard,
    has_row_factor,
    is_wide,
    load_rows,
    n_operand,
    planes_at,
    precision,
    row_factors,
    row_of,
)
from gguf_run.kernels_gpu.rows.quantize import store_int8

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _queries(q, q_stride, t, head, there, K: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Return the queries of tokens t and heads [M]: a tuple of operands that fit those of load_rows for K."""
    queries = ()
    for i in tl.static_range(n_operand(K)):
        column = column_of(tl.arange(0, WIDTH // n_operand(K)), i, K)[None, :]
        at = q + t[:, None] * q_stride + head[:, None] * HEAD_DIM + column
        x = tl.load(at, mask=there[:, None] & (column < HEAD_DIM), other=0.0)
        queries = queries + ((x if is_wide(K) else x.to(tl.float16)),)
    return queries


@triton.jit
def _scores(
    queries, k, rows, live, scale, SOFTCAP: tl.constexpr, K: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr
):
    """Return the scores of queries and some rows of keys, f32[M, rows]."""
    keys = load_rows(k, rows, live, K, HEAD_DIM, WIDTH)
    score = tl.dot(queries[0], tl.trans(keys[0]), input_precision=precision(K))
    if n_operand(K) == 2:
        score = tl.dot(queries[1], tl.trans(keys[1]), score)
    score *= scale
    if has_row_factor(K):
        score *= row_factors(k, rows, live, K)[None, :]
    if SOFTCAP is not None:
        score = SOFTCAP * (2 * tl.sigmoid(score * (2 / SOFTCAP)) - 1)
    return score


@triton.jit
def _add_values(acc, old, weight, v, rows, live, V: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Return acc * old + weight @ values, for each operand of the values. acc: a tuple of f32[M, columns]."""
    values = load_rows(v, rows, live, V, HEAD_DIM, WIDTH)
    if has_row_factor(V):  # the weights take the factors, relative to the greatest one: so f16 holds them
        factor = row_factors(v, rows, live, V)
        largest = tl.max(factor, axis=0)
        weight *= (factor / tl.where(largest == 0, 1.0, largest))[None, :]
    if not is_wide(V):
        weight = weight.to(tl.float16)
    added = ()
    for i in tl.static_range(n_operand(V)):
        if has_row_factor(V):
            added = added + (acc[i] * old[:, None] + tl.dot(weight, values[i]) * largest,)
        else:
            added = added + (tl.dot(weight, values[i], acc[i] * old[:, None], input_precision=precision(V)),)
    return added


@triton.jit
def _item(items):
    """Return this program's item: its first token, number of tokens, part, number of parts, and row of sums."""
    item = items + tl.program_id(0) * 5  # tables.ITEM_WORDS
    return tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3), tl.load(item + 4).to(tl.int64)


@triton.jit
def attend(
    q, q_stride, k, v, seqs, positions, runs, run_of, items, pages, pages_stride, n_pages, sums, stats, n_head_kv,
    n_rep, scale, window,
    CHUNKED: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, REP: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Attend over a part of the positions that tokens see.

    sums f32[row, n_head, VALUE] = exp2(score - greatest) @ v
    stats f32[row, n_head, 2] = (greatest score, sum of exp2(score - greatest)); (-inf, 0) for no position

    Grid (items, n_head_kv * n_rep / REP). k, v: planes of the cache (qs, d).
    items: i32[items, 5] of up to TOKENS tokens each, see tables.Items. The sums of an item are in consecutive rows.
    pages: i32[sequences, pages_stride], see models.pages. n_pages: those of a head.
    n_rep: heads of queries for a KV head. CHUNKED, CAUSAL: as in AttentionShape.
    SOFTCAP: None, or scores become SOFTCAP * tanh(score / SOFTCAP). K, V: cache types. WIDTH: power of 2 >= HEAD_DIM.
    VALUE: the first columns of a row of V, of HEAD_DIM columns, that are the value. VALUE_WIDTH: power of 2 >= VALUE.
    The rows of a tile are TOKENS tokens x REP heads. SPAN: positions at a time, which are in one page.
    """
    M: tl.constexpr = TOKENS * REP
    token, n_mine, part, n_part, item_row = _item(items)
    if n_mine == 0:
        return
    n_tile = tl.cdiv(n_rep, REP)  # of a KV head
    kv_head = tl.program_id(1) // n_tile
    r = tl.arange(0, M)
    t = (token + r // REP).to(tl.int64)
    of_kv_head = tl.program_id(1) % n_tile * REP + r % REP
    there = (r // REP < n_mine) & (of_kv_head < n_rep)
    head = kv_head * n_rep + of_kv_head
    position = tl.load(positions + t, mask=there, other=-1)
    seq = tl.load(seqs + token)
    pages += seq.to(tl.int64) * pages_stride
    queries = _queries(q, q_stride, t, head, there, K, HEAD_DIM, WIDTH)
    since = position // window * window if CHUNKED else position - window + 1  # the first position of the window
    ahead = 0 if CAUSAL else window - 1  # later positions that a token sees
    acc = ()
    for _ in tl.static_range(n_operand(V)):
        acc = acc + (tl.zeros((M, VALUE_WIDTH // n_operand(V)), tl.float32),)
    greatest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    end = tl.max(position, axis=0) + 1
    if not CAUSAL:
        run = runs + tl.load(run_of + token) * 5  # buffers.RUN_WORDS
        end = tl.minimum(end + ahead, tl.load(run + 1) + tl.load(run + 2))  # at most that of the step
    first = tl.maximum(tl.min(tl.where(position < 0, end, since), axis=0), 0) // SPAN * SPAN
    size = tl.cdiv(tl.cdiv(end - first, SPAN), n_part) * SPAN
    first += part * size
    rows = tl.arange(0, SPAN)
    for start in range(first, tl.minimum(first + size, end), SPAN):
        p = start + rows
        live = p < end
        row = row_of(pages, n_pages, kv_head, start)
        k_rows = planes_at(k, row, K, HEAD_DIM)
        v_rows = planes_at(v, row, V, HEAD_DIM)
        score = _scores(queries, k_rows, rows, live, scale, SOFTCAP, K, HEAD_DIM, WIDTH)
        seen = (p[None, :] - ahead <= position[:, None]) & (p[None, :] >= since[:, None])
        if not CAUSAL:
            seen = seen & live[None, :]
        score = tl.where(seen, score * LOG2E, float("-inf"))
        new = tl.maximum(greatest, tl.max(score, axis=1))
        known = tl.where(new == float("-inf"), 0.0, new)  # no position yet: all weights are 0
        weight = tl.exp2(score - known[:, None])
        old = tl.exp2(greatest - known)
        total = total * old + tl.sum(weight, axis=1)
        greatest = new
        acc = _add_values(acc, old, weight, v_rows, rows, live, V, HEAD_DIM, VALUE_WIDTH)
    to = (item_row + r // REP) * (n_head_kv * n_rep) + head
    tl.store(stats + to * 2, greatest, mask=there)
    tl.store(stats + to * 2 + 1, total, mask=there)
    for i in tl.static_range(n_operand(V)):
        column = column_of(tl.arange(0, VALUE_WIDTH // n_operand(V)), i, V)[None, :]
        tl.store(sums + to[:, None] * VALUE + column, acc[i], mask=there[:, None] & (column < VALUE))


@triton.jit
def add_up(
    sums, stats, items, sinks, out, out_stride, int8,
    PARTS: tl.constexpr, ROTATE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out = the sum of attend's parts; grid (items, heads). The first part's program does it for its tokens.

    sinks: None, or a score for each head that has no value. PARTS: parts that are read at a time.
    int8: None, or (xq, xd, xs): gets the result as int8 (rows/quantize.py); HEAD_DIM must be WIDTH.
    """
    token, n_token, part, n_part, first = _item(items)
    if part > 0:
        return
    head, n_head = tl.program_id(1), tl.num_programs(1)
    column = tl.arange(0, WIDTH)
    for i in range(n_token):
        value = tl.zeros((WIDTH,), tl.float32)
        greatest, total = float("-inf"), 0.0
        if sinks is not None:
            greatest, total = tl.load(sinks + head) * LOG2E, 1.0
        for start in range(0, n_part, PARTS):
            k = start + tl.arange(0, PARTS)
            at = (first + i + k * n_token) * n_head + head
            score = tl.load(stats + at * 2, mask=k < n_part, other=float("-inf"))
            new = tl.maximum(greatest, tl.max(score, axis=0))
            known = tl.where(new == float("-inf"), 0.0, new)  # no position yet: all weights are 0
            weight = tl.exp2(score - known)
            old = tl.exp2(greatest - known)
            total = total * old + tl.sum(weight * tl.load(stats + at * 2 + 1, mask=k < n_part, other=0.0), axis=0)
            mask = (weight > 0)[:, None] & (column < HEAD_DIM)[None, :]
            sum = tl.load(sums + at[:, None] * HEAD_DIM + column[None, :], mask=mask, other=0.0)
            value = value * old + tl.sum(sum * weight[:, None], axis=0)
            greatest = new
        value /= tl.where(total == 0, 1.0, total)
        if ROTATE:
            value = hadamard(value, HEAD_DIM)
        t = (token + i).to(tl.int64)
        tl.store(out + t * out_stride + head * HEAD_DIM + column, value, mask=column < HEAD_DIM)
        if int8 is not None:
            store_int8(value, head * HEAD_DIM, int8, t, n_head * HEAD_DIM, WIDTH)
