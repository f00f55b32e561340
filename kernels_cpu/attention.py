"""Causal attention over a KV cache of f32 or f16, as flash attention: spans of positions, tiles of query rows.

The cache of a layer (n_ctx and wide, V's head_dim, are filled up to pairs of panels, see memory.py):

    K  [n_head_kv][n_ctx / 16][head_dim][16]     a float panel whose rows are positions: q.k is a matmul tile
    V  [n_head_kv][n_ctx][wide]                  a float panel whose columns are positions: so is p.v

The query rows of a piece of work are all heads that share one KV head, for up to 64 rows' worth of tokens. When there
are too few pieces for the threads (decode), the positions are split too, and `merge` puts the parts together.
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
from gguf_run.kernels_cpu.memory import LANES
from gguf_run.kernels_cpu.native import f32_at, i64_at
from gguf_run.kernels_cpu.op import Op, items, n_pieces, op
from gguf_run.kernels_cpu.panels import ROWS
from gguf_run.kernels_cpu.quantize import quantize_if_wanted
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
def _plan(n_tokens, n_past, n_rep, n_head_kv, window, nth):  # type: ignore[no-untyped-def]
    """(tokens of a piece, pieces of tokens, parts of the positions)"""
    per = max(1, MAX_ROWS // n_rep)
    n_blocks = (n_tokens + per - 1) // per
    seen = n_past + n_tokens
    if window:
        seen = min(seen, window + n_tokens)
    missing = (_PIECES * nth + n_blocks * n_head_kv - 1) // (n_blocks * n_head_kv)
    n_split = 1 if nth == 1 else max(1, min(missing, seen // _MIN_SPLIT))
    return per, n_blocks, n_split


def max_rows(n_rep: int) -> int:
    """Query rows of a piece of work, filled up to whole tiles."""
    return -(-max(n_rep, MAX_ROWS) // TILE) * TILE


def max_parts(nth: int) -> int:
    """Pieces of work, at most, when positions are split: fewer than twice what was aimed at."""
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

    @op("rows n_past n_head_kv head_dim wide n_ctx k k_stride v v_stride cache_k cache_v")
    def append_rows(args, piece, ith, nth):  # type: ignore[no-untyped-def]
        a = carray(args, 1)[0]
        n_past, n = i64_at(a.n_past, 1)[0], a.head_dim
        wide = a.wide
        n_items = i64_at(a.rows, 1)[0] * a.n_head_kv
        if piece < 0:
            return n_pieces(n_items, 4, nth)
        first, end = items(piece, n_items, 4, nth)
        for item in range(first, end):
            t, head = item // a.n_head_kv, item % a.n_head_kv
            position = n_past + t
            k, v = f32_at(a.k + t * a.k_stride + head * n * 4, n), f32_at(a.v + t * a.v_stride + head * n * 4, n)
            panel = head * a.n_ctx // ROWS + position // ROWS
            to_k = a.cache_k + (panel * n * ROWS + position % ROWS) * element_bytes
            to_v = a.cache_v + (head * a.n_ctx + position) * wide * element_bytes
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
        "rows n_past n_head n_head_kv head_dim wide n_ctx window q q_stride cache_k cache_v out out_stride "
        "parts part_bytes max_rows scratch scratch_stride",
        "scale",
    )
    def attend_rows(args, piece, ith, nth):  # type: ignore[no-untyped-def]
        a = carray(args, 1)[0]
        n_tokens, n_past, n = i64_at(a.rows, 1)[0], i64_at(a.n_past, 1)[0], a.head_dim
        wide, n_rep, scale = a.wide, a.n_head // a.n_head_kv, np.float32(a.scale)
        per, n_blocks, n_split = _plan(n_tokens, n_past, n_rep, a.n_head_kv, a.window, nth)
        if piece < 0:
            return n_blocks * a.n_head_kv * n_split
        split, head = piece % n_split, piece // n_split % a.n_head_kv
        # the last tokens see most: they come first, so that threads end together
        block = n_blocks - 1 - piece // (n_split * a.n_head_kv)
        t0 = block * per
        n_rows = (min(n_tokens, t0 + per) - t0) * n_rep
        few = n_rows <= FEW
        step, width = (FEW, FEW_VECTORS * ROWS) if few else (TILE, VECTORS * ROWS)
        n_fill = (n_rows + step - 1) // step * step

        scores = a.scratch + ith * a.scratch_stride
        lane_sums = scores + TILE * SPAN * 4
        queries = lane_sums + a.max_rows * ROWS * 4
        sums = queries + a.max_rows * n * 4
        if n_split > 1:
            sums = a.parts + ((block * a.n_head_kv + head) * n_split + split) * a.part_bytes
        most = sums + a.max_rows * wide * 4
        q, lanes = f32_at(queries, n_fill * n), f32_at(lane_sums, n_fill * ROWS)
        total, maxima = f32_at(sums, n_fill * wide), f32_at(most, n_fill)
        q[:] = 0
        total[:] = 0
        lanes[:] = 0
        maxima[:] = LOWEST
        for r in range(n_rows):
            source = a.q + (t0 + r // n_rep) * a.q_stride + (head * n_rep + r % n_rep) * n * 4
            scaled_copy(source, n, scale, queries + r * n * 4)

        low, high = 0, n_past + t0 + n_rows // n_rep
        if a.window:
            low = max(0, n_past + t0 + 1 - a.window)
        length = ((high - low + n_split - 1) // n_split + LANES - 1) // LANES * LANES
        start = low // LANES * LANES + split * length
        # a split's range is whole panels; rounding the first one down leaves the last one a little longer
        stop = high if split == n_split - 1 else min(high, start + length)
        while start < stop:
            k = a.cache_k + (head * a.n_ctx + start) * n * element_bytes
            v = a.cache_v + (head * a.n_ctx + start) * wide * element_bytes
            next_k, next_v = k, v
            if start + SPAN < stop:
                next_k, next_v = k + SPAN * n * element_bytes, v + SPAN * wide * element_bytes
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
            out = a.out + (t0 + r // n_rep) * a.out_stride + (head * n_rep + r % n_rep) * n * 4
            scaled_copy(sums + r * wide * 4, n, np.float32(1) / exponential_sum, out)
        return 0

    return attend_rows


@op("rows n_past n_head n_head_kv head_dim wide window out out_stride parts part_bytes max_rows q8 q8_stride")
def merge(args, piece, ith, nth):  # type: ignore[no-untyped-def]
    """Put the parts of split positions together into out, and quantize out's rows if q8 is not 0."""
    a = carray(args, 1)[0]
    n_tokens, n_past, n = i64_at(a.rows, 1)[0], i64_at(a.n_past, 1)[0], a.head_dim
    wide, n_rep = a.wide, a.n_head // a.n_head_kv
    per, _, n_split = _plan(n_tokens, n_past, n_rep, a.n_head_kv, a.window, nth)
    if piece < 0:
        return n_pieces(n_tokens, 1, nth)
    first, end = items(piece, n_tokens, 1, nth)
    for t in range(first, end):
        for h in range(a.n_head if n_split > 1 else 0):
            row = t % per * n_rep + h % n_rep
            part = a.parts + (t // per * a.n_head_kv + h // n_rep) * n_split * a.part_bytes
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
