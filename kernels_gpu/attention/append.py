"""Prepares attention in one launch: norms, rope and Hadamard transform of heads; new rows of the cache."""

import triton
import triton.language as tl

from gguf_run.kernels_gpu.attention.cache_codec import store_row
from gguf_run.kernels_gpu.attention.cache_rows import (
    column_of,
    hadamard,
    has_row_factor,
    load_rows,
    planes_at,
    row_factors,
    row_of,
)


@triton.jit
def _turned(at, norm, eps, table, t, n_half, STYLE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Return a head at `at`, normed and turned.

    norm: None, or the weights of an RMS norm. table: the tokens' cosines and sines (rows/rope.py).
    STYLE: None, or that of the rotation, see operands.Rotation.
    """
    i = tl.arange(0, WIDTH)
    x = tl.load(at + i, mask=i < HEAD_DIM, other=0.0)
    if norm is not None:
        factor = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=0) / HEAD_DIM + eps)
        x = x * factor * tl.load(norm + i, mask=i < HEAD_DIM, other=0.0)
    if STYLE is not None:
        turns = i < 2 * n_half
        first = i < n_half if STYLE == "neox" else i % 2 == 0
        other = tl.where(first, i + n_half, i - n_half) if STYLE == "neox" else i ^ 1
        pair = (i % n_half if STYLE == "neox" else i // 2) * 2
        y = tl.load(at + other, mask=turns, other=0.0)
        if norm is not None:
            y = y * factor * tl.load(norm + other, mask=turns, other=0.0)
        cos = tl.load(table + t * n_half * 2 + pair, mask=turns, other=1.0)
        sin = tl.load(table + t * n_half * 2 + pair + 1, mask=turns, other=0.0)
        x = x * cos + tl.where(first, -y, y) * sin
    return x


@triton.jit
def append(
    q, q_stride, k, k_stride, v, v_stride, q_norm, k_norm, eps, k_planes, v_planes, k_scales, v_scales, seqs,
    positions, table, n_half, pages, pages_stride, n_pages, n_head, n_head_kv,
    STYLE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ROTATE_K: tl.constexpr, ROTATE_V: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Norm and turn q in place and k; store rows of the cache from k and v. Grid (tokens, n_head + 2 n_head_kv).

    n_head: heads of q; 0 if q stays as it is. q_norm, k_norm: None, or weights of an RMS norm of each head.
    k_planes, v_planes: (qs, d) of the cache. pages: i32[sequences, pages_stride], see models.pages.
    A token of position -1 only fills up: nothing of it is stored.
    """
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(positions + t)
    if position < 0:
        return
    kv_head = (head - n_head) % n_head_kv
    row = row_of(pages + tl.load(seqs + t).to(tl.int64) * pages_stride, n_pages, kv_head, position)
    if head < n_head:
        at = q + t * q_stride + head * HEAD_DIM
        x = _turned(at, q_norm, eps, table, t, n_half, STYLE, HEAD_DIM, WIDTH)
        if ROTATE_K:
            x = hadamard(x, HEAD_DIM)
        tl.debug_barrier()  # other threads have read what is written now
        i = tl.arange(0, WIDTH)
        tl.store(at + i, x, mask=i < HEAD_DIM)
    elif head < n_head + n_head_kv:
        x = _turned(k + t * k_stride + kv_head * HEAD_DIM, k_norm, eps, table, t, n_half, STYLE, HEAD_DIM, WIDTH)
        if ROTATE_K:
            x = hadamard(x, HEAD_DIM)
        store_row(x, k_planes, row, k_scales, kv_head, K, HEAD_DIM)
    else:
        x = _turned(v + t * v_stride + kv_head * HEAD_DIM, None, eps, table, t, n_half, None, HEAD_DIM, WIDTH)
        if ROTATE_V:
            x = hadamard(x, HEAD_DIM)
        store_row(x, v_planes, row, v_scales, kv_head, V, HEAD_DIM)


@triton.jit
def read_rows(planes, rows, n_rows, out, TYPE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """out f32[heads, n, HEAD_DIM] = rows rows[i] of each head, as stored; grid (n, heads). n_rows: those of a head."""
    i = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    planes = planes_at(planes, head * n_rows, TYPE, HEAD_DIM)
    rows = tl.load(rows + i + tl.arange(0, 1))
    live = rows >= 0
    tiles = load_rows(planes, rows, live, TYPE, HEAD_DIM, WIDTH)
    for part in tl.static_range(len(tiles)):
        value = tiles[part].to(tl.float32)
        if has_row_factor(TYPE):
            value *= row_factors(planes, rows, live, TYPE)[:, None]
        c = tl.arange(0, WIDTH // len(tiles))
        column = column_of(c, part, TYPE)
        at = out + (head * tl.num_programs(0) + i) * HEAD_DIM + column[None, :]
        tl.store(at, value, mask=column[None, :] < HEAD_DIM)
