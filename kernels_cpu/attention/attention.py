"""Causal attention over a KV cache of any type, as flash attention: spans of positions, tiles of query rows.

The cache of a layer holds groups of 32 positions (cache_types.py), [n_seq][n_head_kv][n_ctx / 32] of them. Position p
of a sequence stands in row p % n_ctx: a layer with a window holds no more than that and a batch. Spans begin at
multiples of SPAN, so none of them goes over the end.

The query rows of a piece of work are all heads that share one KV head, for up to 64 rows' worth of tokens of one
sequence. When there are too few pieces for the threads (decode), the positions are split too, more often for sequences
that see more of them, and `merge` puts the parts together.
"""

import functools
import math

import numpy as np

from gguf_run.formats.compiler.jit import carray, njit
from gguf_run.kernels_cpu.attention.cache_types import FORMATS
from gguf_run.kernels_cpu.attention.float_tiles import FEW, FEW_VECTORS, TILE, VECTORS, score_tile, value_tile
from gguf_run.kernels_cpu.attention.hadamard import hadamard
from gguf_run.kernels_cpu.attention.int_tiles import (
    INT_ROWS,
    P_BYTES,
    fetch,
    int_score_tile,
    int_value_tile,
    quantize_p,
    scale_columns,
)
from gguf_run.kernels_cpu.attention.plan import plan, tokens_at_once
from gguf_run.kernels_cpu.attention.softmax import (
    HEADROOM,
    LOWEST,
    SPAN,
    cap,
    exponentials,
    hide,
    lane_sum,
    raise_maximum,
    rise,
    scale_vectors,
)
from gguf_run.kernels_cpu.panels.panels import BLOCK, ROWS, FloatPanel, IntPanel
from gguf_run.kernels_cpu.replay.op import TapeOp, op
from gguf_run.kernels_cpu.replay.runs import runs_at
from gguf_run.kernels_cpu.rows.quantize import quantize_row
from gguf_run.kernels_cpu.vector.native import f32_at, i64_at
from gguf_run.models.kv_cache import GROUP

_AHEAD = 2  # groups of integers between what is used and what is asked for


@njit(inline="always")
def scaled_copy(source, n, factor, to):  # type: ignore[no-untyped-def]
    x, out = f32_at(source, n), f32_at(to, n)
    for i in range(n):
        out[i] = x[i] * factor


@functools.cache
def attend(k_form: int, v_form: int) -> TapeOp:
    """softmax(scale * q.k) @ v over a cache of these types (places in FORMATS).

    With one part, out gets the result; with more, parts gets each piece's sums, maxima and sums of exponentials.
    """
    k_panel, v_panel = FORMATS[k_form].panel, FORMATS[v_form].panel
    k_is_int, v_is_int = isinstance(k_panel, IntPanel), isinstance(v_panel, IntPanel)
    k_size = k_panel.element_bytes if isinstance(k_panel, FloatPanel) else 0
    v_size = v_panel.element_bytes if isinstance(v_panel, FloatPanel) else 0
    k_in_rows, v_in_rows = FORMATS[k_form].block is None, FORMATS[v_form].block is None  # one scale for a row
    v_in_blocks = bool(FORMATS[v_form].block)
    v_plane_bytes = 4 * ROWS * FORMATS[v_form].bits  # of 16 columns of a group
    v_chunk = GROUP if v_in_rows else SPAN  # positions that stand in one piece, if floats

    @op(
        "runs n_runs n_head n_head_kv head_dim n_wide wide n_ctx window q q_stride cache_k k_group k_at k_rotate "
        "cache_v v_group v_at v_rotate sinks out out_stride parts part_bytes max_rows scratch scratch_stride",
        "scale softcap",
    )
    def attend_rows(args, piece, ith, nth):  # type: ignore[no-untyped-def]
        a = carray(args, 1)[0]
        runs = runs_at(a.runs, i64_at(a.n_runs, 1)[0])
        n, wide, n_rep, scale = a.head_dim, a.wide, a.n_head // a.n_head_kv, np.float32(a.scale)
        if piece < 0:
            return plan(runs, n_rep, a.n_head_kv, a.window, nth)
        number = len(runs) - 1
        while runs[number].first_piece > piece:
            number -= 1
        run = runs[number]
        n_past, n_split = run.n_past, run.n_split
        part = piece - run.first_piece
        split, head = part % n_split, part // n_split % a.n_head_kv
        t0 = part // (n_split * a.n_head_kv) * tokens_at_once(n_rep)
        n_rows = min(run.n_tokens - t0, tokens_at_once(n_rep)) * n_rep
        few = n_rows <= FEW
        step, width = (FEW, FEW_VECTORS * ROWS) if few else (TILE, VECTORS * ROWS)
        n_fill = (n_rows + step - 1) // step * step

        scores = a.scratch + ith * a.scratch_stride
        zeros = scores + TILE * SPAN * 4
        query = zeros + ROWS * 4
        lane_sums = query + a.n_wide * 4
        queries = lane_sums + a.max_rows * ROWS * 4
        p = queries + a.max_rows * a.n_wide * 4
        sums = p + TILE * (wide // BLOCK) * P_BYTES
        if n_split > 1:
            sums = a.parts + (run.first_part + part) * a.part_bytes
        most = sums + a.max_rows * wide * 4
        q_row = a.n_wide * 2 if k_is_int else n * 4
        f32_at(zeros, ROWS + a.n_wide)[:] = 0
        f32_at(queries, n_fill * q_row // 4)[:] = 0
        f32_at(sums, n_fill * wide)[:] = 0
        f32_at(lane_sums, n_fill * ROWS)[:] = 0
        f32_at(most, n_fill)[:] = LOWEST
        for r in range(n_rows):
            source = a.q + (run.first + t0 + r // n_rep) * a.q_stride + (head * n_rep + r % n_rep) * n * 4
            to = query if k_is_int else queries + r * q_row
            scaled_copy(source, n, scale, to)
            if a.k_rotate:
                hadamard(to, n)
            if k_is_int:
                quantize_row(query, a.n_wide // BLOCK, queries + r * q_row)

        low, high = 0, n_past + t0 + n_rows // n_rep
        if a.window:
            low = max(0, n_past + t0 + 1 - a.window)
        length = ((high - low + n_split - 1) // n_split + SPAN - 1) // SPAN * SPAN
        start = low // SPAN * SPAN + split * length
        # a split's range is whole spans; rounding the first one down leaves the last one a little longer
        stop = high if split == n_split - 1 else min(high, start + length)
        first_group = (run.seq * a.n_head_kv + head) * a.n_ctx // GROUP
        next_group = first_group + start % a.n_ctx // GROUP
        while start < stop:
            k, v = a.cache_k + next_group * a.k_group, a.cache_v + next_group * a.v_group
            if start + SPAN < stop:
                next_group = first_group + (start + SPAN) % a.n_ctx // GROUP
            next_k, next_v = a.cache_k + next_group * a.k_group, a.cache_v + next_group * a.v_group
            for r in range(0, n_fill, step):
                # positions of the span that the first row and the last row of the tile see
                first = n_past + t0 + r // n_rep + 1 - start
                last = n_past + t0 + min(r + step - 1, n_rows - 1) // n_rep + 1 - start
                n_seen = min(SPAN, stop - start, last)
                if n_seen <= 0:
                    continue
                if k_is_int:
                    for i in range(0, n_seen, GROUP):
                        at = k + i // GROUP * a.k_group + a.k_at
                        if r == 0:
                            fetch(at + _AHEAD * a.k_group, a.k_group)
                        for row in range(0, step, INT_ROWS):
                            int_score_tile(
                                k_form, queries + (r + row) * q_row, q_row, at, a.n_wide // BLOCK, zeros,
                                scores + (row * SPAN + i) * 4,
                            )  # fmt: skip
                else:
                    for i in range(0, n_seen, width):
                        here = i // GROUP * a.k_group + a.k_at + i % GROUP * n * k_size
                        score_tile(
                            k_form, few, queries + r * q_row, k + here, ROWS * n * k_size, n, next_k + here,
                            scores + i * 4,
                        )  # fmt: skip
                if k_in_rows:
                    scale_columns(k_form, scores, step, k, a.k_group, n_seen)
                if a.softcap:
                    cap(scores, step, np.float32(a.softcap))
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
                if v_is_int:
                    n_blocks = wide // BLOCK if v_in_blocks else 1
                    quantize_p(v_form, scores, step, v, a.v_group, n_seen, n_blocks, p)
                    for d in range(wide // BLOCK):
                        here = v + a.v_at + d * 2 * v_plane_bytes
                        block = p + (d * P_BYTES if v_in_blocks else 0)
                        if r == 0:
                            per = 2 * a.v_group // (wide // BLOCK)
                            fetch(v + _AHEAD * a.v_group + d * per, per)
                        for row in range(0, step, INT_ROWS):
                            int_value_tile(
                                v_form, block + row * n_blocks * P_BYTES, n_blocks * P_BYTES, here, a.v_group,
                                (n_seen + GROUP - 1) // GROUP, sums + ((r + row) * wide + d * BLOCK) * 4, wide * 4,
                            )  # fmt: skip
                    continue
                if v_in_rows:
                    scale_columns(v_form, scores, step, v, a.v_group, n_seen)
                for i in range(0, n_seen, v_chunk):
                    for d in range(0, wide, width):
                        here = i // GROUP * a.v_group + a.v_at + d * v_size
                        value_tile(
                            v_form, few, scores + i * 4, v + here, wide * v_size, min(v_chunk, n_seen - i),
                            next_v + here + d * (v_chunk - 1) * v_size, sums + (r * wide + d) * 4, wide * 4,
                        )  # fmt: skip
            start += SPAN
        for r in range(n_rows):
            total = lane_sum(lane_sums + r * ROWS * 4)
            if n_split > 1:
                f32_at(most + a.max_rows * 4, n_rows)[r] = total
                continue
            factor = np.float32(1)
            if a.sinks:
                sink, highest = f32_at(a.sinks, a.n_head)[head * n_rep + r % n_rep], f32_at(most, n_rows)[r]
                factor = np.float32(math.exp(highest - max(highest, sink)))
                total = total * factor + np.float32(math.exp(sink - max(highest, sink)))
            out = a.out + (run.first + t0 + r // n_rep) * a.out_stride + (head * n_rep + r % n_rep) * n * 4
            scaled_copy(sums + r * wide * 4, n, factor / total, out)
            if a.v_rotate:
                hadamard(out, n)
        return 0

    return attend_rows
