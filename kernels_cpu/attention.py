"""Causal attention over a KV cache of f32 or f16, as flash attention in tiles of 32 positions and 4 query rows.

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
from numba import carray, types
from numba.extending import intrinsic

from gguf_run.formats.jit import njit
from gguf_run.kernels_cpu.memory import LANES
from gguf_run.kernels_cpu.native import f32_at, i64_at
from gguf_run.kernels_cpu.op import Op, items, n_pieces, op
from gguf_run.kernels_cpu.panels import ROWS
from gguf_run.kernels_cpu.quantize import quantize_if_wanted
from gguf_run.kernels_cpu.simd import F16, F32, Simd, Val, kernel
from gguf_run.kernels_cpu.tile import tile

TILE = 4  # query rows of a tile
SPAN = 64  # positions between two updates of the running maximum
MAX_ROWS = 64  # query rows of a piece of work, if one token has no more
_PIECES = 4  # pieces of work per thread that splitting the positions aims at
_MIN_SPLIT = 128  # positions below which a split is not worth its merge
_NEVER = np.float32(-1e30)  # the score of a position that is not seen; finite, so that differences are numbers


@intrinsic(prefer_literal=True)
def _store(typing_context: Any, element_bytes: Any, address: Any, value: Any) -> Any:
    """Store an f32 as f32 or f16 (element_bytes: literal 4 or 2)."""
    element = F32 if element_bytes.literal_value == 4 else F16

    def emit(s: Simd, address: Val, value: Val) -> None:
        s.store(value.to(element), address)

    return kernel(types.void(element_bytes, types.intp, types.float32), emit)


@intrinsic
def _softmax_row(typing_context: Any, scores: Any, state: Any) -> Any:
    """One step of the running softmax over SPAN scores, which become exp(score - maximum).

    state: address of f32 (maximum, sum), updated. Returns what earlier sums must be multiplied by.
    """

    def emit(s: Simd, scores: Val, state: Val) -> Val:
        rows = [s.load(scores + 64 * i, F32, 16) for i in range(SPAN // 16)]
        most = functools.reduce(s.maximum, rows)
        old = s.load(state, F32)
        new = s.maximum(s.fold(most, s.maximum), old)
        rows = [s.exp(row - s.splat(new, 16)) for row in rows]
        for i, row in enumerate(rows):
            s.store(row, scores + 64 * i)
        total = s.sum(functools.reduce(lambda a, b: a + b, rows))
        factor = s.fold(s.exp(s.splat(old - new, 2)), lambda a, b: a)
        s.store(new, state)
        s.store(s.load(state + 4, F32) * factor + total, state + 4)
        return factor

    return kernel(types.float32(types.intp, types.intp), emit)


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


def scratch_floats(head_dim: int, wide: int, n_rep: int) -> int:
    """f32 numbers of scratch memory that a thread needs: q, scores and sums of its rows."""
    return max_rows(n_rep) * (head_dim + SPAN + wide + 2) + SPAN


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
        "parts part_bytes scratch scratch_stride zeros",
        "scale",
    )
    def attend_rows(args, piece, ith, nth):  # type: ignore[no-untyped-def]
        a = carray(args, 1)[0]
        n_tokens, n_past, n = i64_at(a.rows, 1)[0], i64_at(a.n_past, 1)[0], a.head_dim
        wide, n_rep = a.wide, a.n_head // a.n_head_kv
        per, n_blocks, n_split = _plan(n_tokens, n_past, n_rep, a.n_head_kv, a.window, nth)
        if piece < 0:
            return n_blocks * a.n_head_kv * n_split
        scratch = a.scratch + ith * a.scratch_stride
        split, head = piece % n_split, piece // n_split % a.n_head_kv
        block = piece // (n_split * a.n_head_kv)
        t0 = block * per
        n_rows = (min(n_tokens, t0 + per) - t0) * n_rep
        n_fill = (n_rows + TILE - 1) // TILE * TILE
        scores = scratch
        queries = scores + n_fill * SPAN * 4
        states = queries + n_fill * n * 4
        sums = states + n_fill * 8
        if n_split > 1:
            sums = a.parts + piece * a.part_bytes
            states = sums + n_fill * wide * 4
        q = f32_at(queries, n_fill * n)
        state, total = f32_at(states, n_fill * 2), f32_at(sums, n_fill * wide)
        total[:] = 0
        for r in range(n_fill):
            state[2 * r], state[2 * r + 1] = _NEVER, 0
            if r < n_rows:
                at = a.q + (t0 + r // n_rep) * a.q_stride + (head * n_rep + r % n_rep) * n * 4
                source = f32_at(at, n)
                for i in range(n):
                    q[r * n + i] = source[i] * np.float32(a.scale)
            else:
                q[r * n : r * n + n] = 0

        low, high = 0, n_past + t0 + n_rows // n_rep
        if a.window:
            low = max(0, n_past + t0 + 1 - a.window)
        length = ((high - low + n_split - 1) // n_split + LANES - 1) // LANES * LANES
        start = low // LANES * LANES + split * length
        # a split's range is whole panels; rounding the first one down leaves the last one a little longer
        stop = high if split == n_split - 1 else min(high, start + length)
        while start < stop:
            n_seen = min(SPAN, stop - start)
            for r in range(0, n_fill, TILE):
                for i in range(0, n_seen, LANES):
                    tile(
                        panel, 2, TILE,
                        a.cache_k + (head * a.n_ctx + start + i) * n * element_bytes,
                        ROWS * n * element_bytes, ROWS * element_bytes, n,
                        queries + r * n * 4, n * 4,
                        scores + (r * SPAN + i) * 4, SPAN * 4,
                        a.zeros, 0,
                    )  # fmt: skip
            for r in range(n_fill):
                row = f32_at(scores + r * SPAN * 4, SPAN)
                position = n_past + t0 + min(r, n_rows - 1) // n_rep
                since = max(0, position + 1 - a.window - start) if a.window else 0
                until = min(n_seen, position + 1 - start)
                for i in range(min(since, SPAN)):
                    row[i] = _NEVER
                for i in range(max(0, until), SPAN):
                    row[i] = _NEVER
                if since >= until:
                    row[:] = 0
                    continue
                factor = _softmax_row(scores + r * SPAN * 4, states + r * 8)
                if factor != 1:
                    for i in range(r * wide, r * wide + wide):
                        total[i] *= factor
            for r in range(0, n_fill, TILE):
                for d in range(0, wide, LANES):
                    sum_at = sums + (r * wide + d) * 4
                    tile(
                        panel, 2, TILE,
                        a.cache_v + ((head * a.n_ctx + start) * wide + d) * element_bytes,
                        ROWS * element_bytes, wide * element_bytes, n_seen,
                        scores + r * SPAN * 4, SPAN * 4,
                        sum_at, wide * 4,
                        sum_at, wide * 4,
                    )  # fmt: skip
            start += SPAN
        if n_split == 1:
            for r in range(n_rows):
                out = f32_at(a.out + (t0 + r // n_rep) * a.out_stride + (head * n_rep + r % n_rep) * n * 4, n)
                inverse = 1 / state[2 * r + 1]
                for i in range(n):
                    out[i] = total[r * wide + i] * inverse
        return 0

    return attend_rows


@op("rows n_past n_head n_head_kv head_dim wide window out out_stride parts part_bytes q8 q8_stride")
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
        block = t // per
        n_fill = ((min(n_tokens, block * per + per) - block * per) * n_rep + TILE - 1) // TILE * TILE
        for h in range(a.n_head if n_split > 1 else 0):
            row = t % per * n_rep + h % n_rep
            base = (block * a.n_head_kv + h // n_rep) * n_split
            most, total = _NEVER, np.float32(0)
            for s in range(n_split):
                state = f32_at(a.parts + (base + s) * a.part_bytes + (n_fill * wide + 2 * row) * 4, 2)
                most = max(most, state[0])
            out = f32_at(a.out + t * a.out_stride + h * n * 4, n)
            out[:] = 0
            for s in range(n_split):
                part = a.parts + (base + s) * a.part_bytes
                state = f32_at(part + (n_fill * wide + 2 * row) * 4, 2)
                sums = f32_at(part + row * wide * 4, n)
                weight = np.float32(math.exp(state[0] - most))
                total += weight * state[1]
                for i in range(n):
                    out[i] += weight * sums[i]
            for i in range(n):
                out[i] /= total
        quantize_if_wanted(a.q8, a.q8_stride, t, a.out + t * a.out_stride, a.n_head * n)
    return 0
