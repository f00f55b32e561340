"""Causal attention over a KV cache of f32 or f16, as flash attention: spans of positions, tiles of query rows.

The cache of a layer (n_ctx and wide, V's head_dim, are filled up, see cache.py):

    K  [n_seq][n_head_kv][n_ctx / 16][head_dim][16]     a float panel whose rows are positions: q.k is a matmul tile
    V  [n_seq][n_head_kv][n_ctx][wide]                  a float panel whose columns are positions: so is p.v

Position p of a sequence stands in row p % n_ctx: a layer with a window holds no more than that and a batch. Spans begin
at multiples of SPAN, so none of them goes over the end.

The query rows of a piece of work are all heads that share one KV head, for up to 64 rows' worth of tokens of one
sequence. When there are too few pieces for the threads (decode), the positions are split too, more often for sequences
that see more of them, and `merge` puts the parts together.
"""

import functools
import math
from typing import Any

import numpy as np

from gguf_run.formats.jit import carray, intrinsic, njit, types
from gguf_run.kernels_cpu.attention_softmax import (
    HEADROOM,
    LOWEST,
    SPAN,
    exponentials,
    hide,
    lane_sum,
    raise_maximum,
    rise,
    scale_vectors,
)
from gguf_run.kernels_cpu.attention_tile import FEW, FEW_VECTORS, TILE, VECTORS, score_tile, value_tile
from gguf_run.kernels_cpu.native import f32_at, i64_at
from gguf_run.kernels_cpu.op import Op, items, n_pieces, op
from gguf_run.kernels_cpu.panels import ROWS
from gguf_run.kernels_cpu.quantize import quantize_if_wanted
from gguf_run.kernels_cpu.runs import runs_at
from gguf_run.kernels_cpu.simd import F16, F32, Simd, Val, kernel

MAX_ROWS = 64 // TILE * TILE  # query rows of a piece of work, if one token has no more
_PIECES = 4  # pieces of work per thread that splitting the positions aims at
_MIN_SPLIT = 128  # positions below which a split is not worth its merge


@intrinsic(prefer_literal=True)
def _store(typing_context: Any, element_bytes: Any, address: Any, value: Any) -> Any:
    """Store an f32 as f32 or f16 (element_bytes: literal 4 or 2)."""
    element = F32 if element_bytes.literal_value == 4 else F16

    def emit(s: Simd, address: Val, value: Val) -> None:
        s.store(value.to(element), address)

    return kernel(types.void(element_bytes, types.intp, types.float32), emit)


@njit(inline="always")
def scaled_copy(source, n, factor, to):  # type: ignore[no-untyped-def]
    x, out = f32_at(source, n), f32_at(to, n)
    for i in range(n):
        out[i] = x[i] * factor


@njit(inline="always")
def _tokens_at_once(n_rep):  # type: ignore[no-untyped-def]
    """Tokens of a piece of work."""
    return max(1, MAX_ROWS // n_rep)


@njit(inline="always")
def _seen(run, window):  # type: ignore[no-untyped-def]
    """Positions that a run's tokens see, all together."""
    seen = run.n_past + run.n_tokens
    return min(seen, window + run.n_tokens) if window else seen


@njit(inline="always")
def _plan(runs, n_rep, n_head_kv, window, nth):  # type: ignore[no-untyped-def]
    """Cut the work of all runs into about _PIECES pieces a thread of alike size; returns how many there are."""
    per = _tokens_at_once(n_rep)
    work = 0
    for r in range(len(runs)):
        work += (runs[r].n_tokens + per - 1) // per * n_head_kv * _seen(runs[r], window)
    n_pieces = n_parts = 0
    for r in range(len(runs)):
        run = runs[r]
        seen = _seen(run, window)
        n_split = 1 if nth == 1 else max(1, min((seen * _PIECES * nth + work - 1) // work, seen // _MIN_SPLIT))
        run.first_piece, run.first_part, run.n_split = n_pieces, n_parts, n_split
        n_new = (run.n_tokens + per - 1) // per * n_head_kv * n_split
        n_pieces += n_new
        if n_split > 1:
            n_parts += n_new
    return n_pieces


def max_rows(n_rep: int) -> int:
    """Query rows of a piece of work, filled up to whole tiles."""
    return -(-max(n_rep, MAX_ROWS) // TILE) * TILE


def max_parts(nth: int) -> int:
    """Pieces of work of runs whose positions are split, at most: fewer than twice what was aimed at."""
    return 2 * _PIECES * nth


def part_floats(wide: int, n_rep: int) -> int:
    """f32 numbers of the result of a piece of work: sums, maxima and sums of exponentials of its rows."""
    return -(-max_rows(n_rep) * (wide + 2) // ROWS) * ROWS


def scratch_floats(head_dim: int, wide: int, n_rep: int) -> int:
    """f32 numbers of scratch memory that a thread needs: scores of a tile, and all that its rows need."""
    return SPAN * TILE + part_floats(wide, n_rep) + max_rows(n_rep) * (ROWS + head_dim)


@functools.cache
def append(element_bytes: int) -> Op:
    """Write the tokens' k and v rows into the cache of f32 or f16 (4 or 2 bytes)."""

    @op("rows runs run_of positions n_head_kv head_dim wide n_ctx k k_stride v v_stride cache_k cache_v")
    def append_rows(args, piece, ith, nth):  # type: ignore[no-untyped-def]
        a = carray(args, 1)[0]
        n_tokens, n, wide = i64_at(a.rows, 1)[0], a.head_dim, a.wide
        positions, run_of, runs = i64_at(a.positions, n_tokens), i64_at(a.run_of, n_tokens), runs_at(a.runs, n_tokens)
        n_items = n_tokens * a.n_head_kv
        if piece < 0:
            return n_pieces(n_items, 4, nth)
        first, end = items(piece, n_items, 4, nth)
        for item in range(first, end):
            t, head = item // a.n_head_kv, item % a.n_head_kv
            position = positions[t] % a.n_ctx
            slot = (runs[run_of[t]].seq * a.n_head_kv + head) * a.n_ctx
            k, v = f32_at(a.k + t * a.k_stride + head * n * 4, n), f32_at(a.v + t * a.v_stride + head * n * 4, n)
            to_k = a.cache_k + ((slot + position // ROWS * ROWS) * n + position % ROWS) * element_bytes
            to_v = a.cache_v + (slot + position) * wide * element_bytes
            for i in range(n):
                _store(element_bytes, to_k + i * ROWS * element_bytes, k[i])
                _store(element_bytes, to_v + i * element_bytes, v[i])
        return 0

    return append_rows


@functools.cache
def attend(panel: int, element_bytes: int) -> Op:
    """softmax(scale * q.k) @ v over a cache whose elements are those of float panel number `panel`.

    With one part, out gets the result; with more, parts gets each piece's sums, maxima and sums of exponentials.
    """

    @op(
        "runs n_runs n_head n_head_kv head_dim wide n_ctx window q q_stride cache_k cache_v out out_stride "
        "parts part_bytes max_rows scratch scratch_stride",
        "scale",
    )
    def attend_rows(args, piece, ith, nth):  # type: ignore[no-untyped-def]
        a = carray(args, 1)[0]
        runs = runs_at(a.runs, i64_at(a.n_runs, 1)[0])
        n, wide, n_rep, scale = a.head_dim, a.wide, a.n_head // a.n_head_kv, np.float32(a.scale)
        if piece < 0:
            return _plan(runs, n_rep, a.n_head_kv, a.window, nth)
        number = len(runs) - 1
        while runs[number].first_piece > piece:
            number -= 1
        run = runs[number]
        n_past, n_split = run.n_past, run.n_split
        part = piece - run.first_piece
        split, head = part % n_split, part // n_split % a.n_head_kv
        # the last tokens see most: they come first, so that threads end together
        t0 = part // (n_split * a.n_head_kv) * _tokens_at_once(n_rep)
        n_rows = min(run.n_tokens - t0, _tokens_at_once(n_rep)) * n_rep
        few = n_rows <= FEW
        step, width = (FEW, FEW_VECTORS * ROWS) if few else (TILE, VECTORS * ROWS)
        n_fill = (n_rows + step - 1) // step * step

        scores = a.scratch + ith * a.scratch_stride
        lane_sums = scores + TILE * SPAN * 4
        queries = lane_sums + a.max_rows * ROWS * 4
        sums = queries + a.max_rows * n * 4
        if n_split > 1:
            sums = a.parts + (run.first_part + part) * a.part_bytes
        most = sums + a.max_rows * wide * 4
        q, lanes = f32_at(queries, n_fill * n), f32_at(lane_sums, n_fill * ROWS)
        total, maxima = f32_at(sums, n_fill * wide), f32_at(most, n_fill)
        q[:] = 0
        total[:] = 0
        lanes[:] = 0
        maxima[:] = LOWEST
        for r in range(n_rows):
            source = a.q + (run.first + t0 + r // n_rep) * a.q_stride + (head * n_rep + r % n_rep) * n * 4
            scaled_copy(source, n, scale, queries + r * n * 4)

        low, high = 0, n_past + t0 + n_rows // n_rep
        if a.window:
            low = max(0, n_past + t0 + 1 - a.window)
        length = ((high - low + n_split - 1) // n_split + SPAN - 1) // SPAN * SPAN
        start = low // SPAN * SPAN + split * length
        # a split's range is whole spans; rounding the first one down leaves the last one a little longer
        stop = high if split == n_split - 1 else min(high, start + length)
        slot = (run.seq * a.n_head_kv + head) * a.n_ctx
        next_row = slot + start % a.n_ctx
        while start < stop:
            row = next_row
            if start + SPAN < stop:
                next_row = slot + (start + SPAN) % a.n_ctx
            k, next_k = a.cache_k + row * n * element_bytes, a.cache_k + next_row * n * element_bytes
            v, next_v = a.cache_v + row * wide * element_bytes, a.cache_v + next_row * wide * element_bytes
            for r in range(0, n_fill, step):
                # positions of the span that the first row and the last row of the tile see
                first = n_past + t0 + r // n_rep + 1 - start
                last = n_past + t0 + min(r + step - 1, n_rows - 1) // n_rep + 1 - start
                n_seen = min(SPAN, stop - start, last)
                if n_seen <= 0:
                    continue
                for i in range(0, n_seen, width):
                    here = i * n * element_bytes
                    score_tile(
                        panel, few, queries + r * n * 4, k + here, ROWS * n * element_bytes, n, next_k + here,
                        scores + i * 4,
                    )  # fmt: skip
                if min(first, stop - start) < SPAN or (a.window and last > a.window):
                    for row in range(step):
                        until = n_past + t0 + min(r + row, n_rows - 1) // n_rep + 1 - start
                        since = until - a.window if a.window else 0
                        hide(scores + row * SPAN * 4, since, min(until, stop - start))
                if rise(scores, step, most + r * 4) > HEADROOM:
                    for row in range(r, r + step):
                        factor = raise_maximum(scores + (row - r) * SPAN * 4, most + row * 4)
                        scale_vectors(sums + row * wide * 4, wide // ROWS, factor)
                        scale_vectors(lane_sums + row * ROWS * 4, 1, factor)
                exponentials(scores, step, most + r * 4, lane_sums + r * ROWS * 4)
                for d in range(0, wide, width):
                    value_tile(
                        panel, few, scores, v + d * element_bytes, wide * element_bytes, n_seen,
                        next_v + d * SPAN * element_bytes, sums + (r * wide + d) * 4, wide * 4,
                    )  # fmt: skip
            start += SPAN
        for r in range(n_rows):
            exponential_sum = lane_sum(lane_sums + r * ROWS * 4)
            if n_split > 1:
                f32_at(most + a.max_rows * 4, n_rows)[r] = exponential_sum
                continue
            out = a.out + (run.first + t0 + r // n_rep) * a.out_stride + (head * n_rep + r % n_rep) * n * 4
            scaled_copy(sums + r * wide * 4, n, np.float32(1) / exponential_sum, out)
        return 0

    return attend_rows


@op("rows runs run_of n_head n_head_kv head_dim wide out out_stride parts part_bytes max_rows q8 q8_stride")
def merge(args, piece, ith, nth):  # type: ignore[no-untyped-def]
    """Put the parts of split positions together into out, and quantize out's rows if q8 is not 0."""
    a = carray(args, 1)[0]
    n_tokens, n = i64_at(a.rows, 1)[0], a.head_dim
    wide, n_rep = a.wide, a.n_head // a.n_head_kv
    per, run_of, runs = _tokens_at_once(n_rep), i64_at(a.run_of, n_tokens), runs_at(a.runs, n_tokens)
    if piece < 0:
        return n_pieces(n_tokens, 1, nth)
    first, end = items(piece, n_tokens, 1, nth)
    for t in range(first, end):
        run = runs[run_of[t]]
        n_split, t0 = run.n_split, t - run.first
        for h in range(a.n_head if n_split > 1 else 0):
            row = t0 % per * n_rep + h % n_rep
            part = a.parts + (run.first_part + (t0 // per * a.n_head_kv + h // n_rep) * n_split) * a.part_bytes
            most, total = LOWEST, np.float32(0)
            for s in range(n_split):
                state = f32_at(part + s * a.part_bytes + (a.max_rows * wide + row) * 4, a.max_rows + 1)
                most = max(most, state[0])
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
        quantize_if_wanted(a.q8, a.q8_stride, t, a.out + t * a.out_stride, a.n_head * n)
    return 0
