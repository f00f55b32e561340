"""Attention over a KV cache of any type, as flash attention: spans of positions, tiles of query rows.

The cache of a layer holds groups of 32 positions (cache_types.py), [n_head_kv][n_pages][2] of them. A sequence has a
table of its pages (models/pages.py). A span is the positions of a page.

The query rows of a piece of work are all heads that share one KV head, for up to 64 rows' worth of tokens of one
sequence. When there are too few pieces for the threads (decode), the positions are split too, and `merge` joins the
parts. plan.py decides how often.

No row's result depends on the other rows of its tile: each has a maximum of its own, and hidden positions count 0.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from gguf_run.formats.compiler.deferred import COMPILING
from gguf_run.formats.compiler.jit import carray, njit
from gguf_run.kernels_cpu.attention.cache_types import FORMATS
from gguf_run.kernels_cpu.attention.sizes import FEW, LATENT_BYTES, P_BYTES, SPAN, TILE, layout
from gguf_run.kernels_cpu.panels.panels import BLOCK, ROWS, FloatPanel, IntPanel
from gguf_run.kernels_cpu.replay.op import TapeOp, n_rows, op, row_op
from gguf_run.kernels_cpu.replay.runs import runs_at
from gguf_run.models.kv_cache import GROUP

if COMPILING:
    from gguf_run.kernels_cpu.attention.float_tiles import FEW_VECTORS, VECTORS, score_tile, value_tile
    from gguf_run.kernels_cpu.attention.hadamard import hadamard
    from gguf_run.kernels_cpu.attention.int_tiles import (
        INT_ROWS,
        int_score_tile,
        int_value_tile,
        quantize_p,
        scale_columns,
    )
    from gguf_run.kernels_cpu.attention.plan import piece_of, plan, row_of
    from gguf_run.kernels_cpu.attention.softmax import LOWEST, n_visible, result, scaled_copy, softmax
    from gguf_run.kernels_cpu.matmul.tile import prefetch
    from gguf_run.kernels_cpu.rows.quantize import quantize_if_wanted, quantize_row
    from gguf_run.kernels_cpu.vector.native import f32_at, i32_at, i64_at


class _Tile(NamedTuple):
    """The query rows and columns that the kernels of float_tiles.py take at once."""

    few: bool  # FEW rows, not TILE
    rows: int
    width: int


@functools.cache
def _queries(k_form: int) -> Any:
    """Return the kernel that makes a piece's queries and empties its sums. It returns the bytes of a query."""
    is_int = isinstance(FORMATS[k_form].panel, IntPanel)

    @njit(inline="always")
    def queries(a, piece, m, n_fill):
        n, scale = a.head_dim, np.float32(a.scale)
        q_row = a.n_wide * 2 if is_int else n * 4
        f32_at(m.zeros, ROWS + a.n_wide)[:] = 0
        f32_at(m.queries, n_fill * q_row // 4)[:] = 0
        f32_at(m.sums, n_fill * a.wide)[:] = 0
        f32_at(m.lane_sums, n_fill * ROWS)[:] = 0
        f32_at(m.most, n_fill)[:] = LOWEST
        for r in range(piece.n_rows):
            t, head = row_of(piece, r)
            to = m.query if is_int else m.queries + r * q_row
            scaled_copy(a.q + t * a.q_stride + head * n * 4, n, scale, to)
            if a.k_rotate:
                hadamard(to, n)
            if is_int:
                quantize_row(m.query, a.n_wide // BLOCK, m.queries + r * q_row)
        return q_row

    return queries


@functools.cache
def _scores(k_form: int) -> Any:
    """Return the kernel that computes the scores of a tile of queries, at q, and the first n_seen positions of a span.

    k, next_k: the group in which this span and the next one begin. first: whether no other tile has read this span.
    """
    form = FORMATS[k_form]
    is_int, has_row_scales = isinstance(form.panel, IntPanel), form.block is None
    size = form.panel.element_bytes if isinstance(form.panel, FloatPanel) else 0

    @njit(inline="always")
    def scores(a, m, tile, q, q_row, k, next_k, n_seen, first):
        n, n_blocks = a.head_dim, a.n_wide // BLOCK
        if is_int:
            for i in range(0, n_seen, GROUP):
                at = k + i // GROUP * a.k_group + a.k_at
                if first:
                    prefetch(next_k + i // GROUP * a.k_group + a.k_at, a.k_group)
                for row in range(0, tile.rows, INT_ROWS):
                    to = m.scores + (row * SPAN + i) * 4
                    int_score_tile(k_form, q + row * q_row, q_row, at, n_blocks, m.zeros, to)
        else:
            for i in range(0, n_seen, tile.width):
                at = i // GROUP * a.k_group + a.k_at + i % GROUP * n * size
                score_tile(k_form, tile.few, q, k + at, ROWS * n * size, n, next_k + at, m.scores + i * 4)
        if has_row_scales:
            scale_columns(k_form, m.scores, tile.rows, k, a.k_group, n_seen)

    return scores


@functools.cache
def _values(v_form: int) -> Any:
    """Return the kernel that adds exponentials times v to the sums of the rows of a tile, from row r on.

    v, next_v: the group in which this span and the next one begin. n_seen: positions of the span.
    """
    form = FORMATS[v_form]
    is_int, has_row_scales, has_blocks = isinstance(form.panel, IntPanel), form.block is None, bool(form.block)
    size = form.panel.element_bytes if isinstance(form.panel, FloatPanel) else 0
    plane_bytes = 4 * ROWS * form.bits  # of 16 columns of a group
    chunk = GROUP if has_row_scales else SPAN  # positions of floats without a gap

    @njit(inline="always")
    def values(a, m, tile, r, v, next_v, n_seen):
        wide = a.wide
        if is_int:
            n_blocks, n_groups = wide // BLOCK if has_blocks else 1, (n_seen + GROUP - 1) // GROUP
            quantize_p(v_form, m.scores, tile.rows, v, a.v_group, n_seen, n_blocks, m.p)
            for d in range(wide // BLOCK):
                at = v + a.v_at + d * 2 * plane_bytes
                block = m.p + (d * P_BYTES if has_blocks else 0)
                if r == 0:
                    share = 2 * a.v_group // (wide // BLOCK)
                    prefetch(next_v + d * share, share)
                for row in range(0, tile.rows, INT_ROWS):
                    p, sums = block + row * n_blocks * P_BYTES, m.sums + ((r + row) * wide + d * BLOCK) * 4
                    int_value_tile(v_form, p, n_blocks * P_BYTES, at, a.v_group, n_groups, sums, wide * 4)
        else:
            if has_row_scales:
                scale_columns(v_form, m.scores, tile.rows, v, a.v_group, n_seen)
            for i in range(0, n_seen, chunk):
                for d in range(0, wide, tile.width):
                    at = i // GROUP * a.v_group + a.v_at + d * size
                    n, ahead = min(chunk, n_seen - i), next_v + at + d * (chunk - 1) * size
                    p, sums = m.scores + i * 4, m.sums + (r * wide + d) * 4
                    value_tile(v_form, tile.few, p, v + at, wide * size, n, ahead, sums, wide * 4)

    return values


@functools.cache
def attend(k_form: int, v_form: int) -> TapeOp:
    """Return the op softmax(scale * q.k) @ v over a cache of these types (places in FORMATS).

    v_form: -1 if values are the first columns of the keys.
    Pieces whose positions are not split write to out. The others write to parts: sums, maxima, sums of exponentials.
    """
    queries, scores, p_bytes = _queries(k_form), _scores(k_form), TILE * P_BYTES
    if is_latent := v_form < 0:
        from gguf_run.kernels_cpu.attention.latent import latent_values  # late: few models have latents

        (rows_of_keys, values), p_bytes = latent_values(k_form), LATENT_BYTES
    else:
        rows_of_keys, values = None, _values(v_form)

    @op(
        "runs n_runs splits n_head n_head_kv head_dim n_value n_wide wide window is_chunked is_causal "
        "pages pages_stride n_pages q q_stride cache_k k_group "
        "k_at k_rotate cache_v v_group v_at v_rotate sinks out out_stride parts part_bytes max_rows scratch "
        "scratch_stride",
        "scale softcap",
    )
    def attend_rows(args, piece, ith, nth):
        a = carray(args, 1)[0]
        runs = runs_at(a.runs, i64_at(a.n_runs, 1)[0])
        if piece < 0:
            return plan(runs, a.n_head // a.n_head_kv, a.n_head_kv, a.window, a.splits, nth)
        work = piece_of(a, runs, piece)
        tile = _Tile(work.few, FEW if work.few else TILE, (FEW_VECTORS if work.few else VECTORS) * ROWS)
        n_fill = (work.n_rows + tile.rows - 1) // tile.rows * tile.rows
        m = layout(a, ith, work, p_bytes)
        q_row = queries(a, work, m, n_fill)
        pages, first_page = i32_at(a.pages + work.seq * a.pages_stride * 4, a.pages_stride), work.head * a.n_pages
        next_group = (first_page + pages[work.start // SPAN]) * (SPAN // GROUP)
        for start in range(work.start, work.stop, SPAN):
            group = next_group
            if start + SPAN < work.stop:
                next_group = (first_page + pages[start // SPAN + 1]) * (SPAN // GROUP)
            k, v = a.cache_k + group * a.k_group, a.cache_v + group * a.v_group
            next_k, next_v = a.cache_k + next_group * a.k_group, a.cache_v + next_group * a.v_group
            if is_latent:
                rows_of_keys(a, m, k, work.stop - start)
            for r in range(0, n_fill, tile.rows):
                n_seen = min(SPAN, work.stop - start, n_visible(work, r + tile.rows - 1, start))
                if n_seen > 0:
                    scores(a, m, tile, m.queries + r * q_row, q_row, k, next_k, n_seen, r == 0)
                    softmax(a, work, m, tile, r, start)
                    values(a, m, tile, r, v, next_v, n_seen)
        for r in range(work.n_rows):
            result(a, work, m, r)
        return 0

    return attend_rows


@row_op(
    "rows runs run_of n_head n_head_kv n_value wide v_rotate sinks out out_stride parts part_bytes max_rows "
    "q8 q8_stride"
)
def merge(a, first, end):
    """out = the joined parts of rows whose positions are split. q8: int8 form of all rows of out, or 0."""
    n_tokens, n = n_rows(a), a.n_value
    wide, n_rep = a.wide, a.n_head // a.n_head_kv
    run_of, runs = i64_at(a.run_of, n_tokens), runs_at(a.runs, n_tokens)
    for t in range(first, end):
        run = runs[run_of[t]]
        n_split, t0, per = run.n_split, t - run.first, run.n_per_piece
        for h in range(a.n_head if n_split > 1 else 0):
            row = t0 % per * n_rep + h % n_rep
            part = a.parts + (run.first_part + (t0 // per * a.n_head_kv + h // n_rep) * n_split) * a.part_bytes
            most, total = LOWEST, np.float32(0)
            if a.sinks:
                most, total = f32_at(a.sinks, a.n_head)[h], np.float32(1)
            before = most
            for s in range(n_split):
                state = f32_at(part + s * a.part_bytes + (a.max_rows * wide + row) * 4, a.max_rows + 1)
                most = max(most, state[0])
            total *= np.float32(math.exp(before - most))
            out = f32_at(a.out + t * a.out_stride + h * n * 4, n)
            out[:] = 0
            for s in range(n_split):
                state = f32_at(part + s * a.part_bytes + (a.max_rows * wide + row) * 4, a.max_rows + 1)
                sums = f32_at(part + s * a.part_bytes + row * wide * 4, n)
                weight = np.float32(math.exp(state[0] - most))
                total += weight * state[a.max_rows]
                for i in range(n):
                    out[i] += weight * sums[i]
            for i in range(n):
                out[i] /= total
            if a.v_rotate:
                hadamard(a.out + t * a.out_stride + h * n * 4, n)
        quantize_if_wanted(a.q8, a.q8_stride, t, a.out + t * a.out_stride, a.n_head * n)
