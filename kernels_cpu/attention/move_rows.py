"""Rows out of a cache and back into it, as floats: keys that turn when a context is shifted."""

import functools
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.compiler.deferred import COMPILING
from gguf_run.formats.compiler.jit import njit
from gguf_run.kernels_cpu.attention.cache_rows import CacheRows, filled, scratch_bytes, store_row
from gguf_run.kernels_cpu.attention.cache_types import format_id
from gguf_run.models.kv_cache import GROUP
from gguf_run.models.operands import Rotation

if COMPILING:
    from gguf_run.kernels_cpu.attention.cache_codec import decode
    from gguf_run.kernels_cpu.attention.cache_layout import move_row
    from gguf_run.kernels_cpu.attention.hadamard import hadamard
    from gguf_run.kernels_cpu.vector.native import f32_at


@functools.cache
def _load_row(form: int, is_v: int) -> Any:
    """Return the kernel that undoes `store_row`, whose arguments it takes."""

    @njit
    def load(x, n, n_wide, wide, rotate, static, group, row, scratch):
        codes, numbers = scratch + 4 * n_wide, scratch + 8 * n_wide
        move_row(form, is_v, 0, group, row, wide, codes, numbers)
        decode(form, codes, numbers, n_wide, scratch)
        if rotate:
            hadamard(scratch, n)
        f32_at(x, n)[:] = f32_at(scratch, n)

    return load


@functools.cache
def _move_rows(form: int, is_v: int, is_store: bool) -> Any:
    move = (store_row if is_store else _load_row)(form, is_v)

    @njit
    def move_rows(data, slots, sizes, rotate, scales, x, scratch):
        n_head, n, n_wide, wide, head_bytes, group_bytes = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]
        for i in range(len(slots)):
            for head in range(n_head):
                group = data.ctypes.data + head * head_bytes + slots[i] // GROUP * group_bytes
                at = x.ctypes.data + (i * n_head + head) * n * 4
                move(at, n, n_wide, wide, rotate, scales[head], group, slots[i] % GROUP, scratch.ctypes.data)

    return move_rows


def store_rows(rows: CacheRows, memory: NDArray[np.uint8], slots: NDArray[np.int64], x: NDArray[np.float32]) -> None:
    """Quantize f32[n, n_head_kv, head_dim] into the rows of memory u8[rows.nbytes] with the numbers slots, i64[n]."""
    _move(rows, True, memory, slots, np.ascontiguousarray(x, np.float32))


def load_rows(rows: CacheRows, memory: NDArray[np.uint8], slots: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the rows with the numbers slots, i64[n], as f32[n, n_head_kv, head_dim]."""
    x = np.empty((len(slots), rows.n_head_kv, rows.head_dim), np.float32)
    _move(rows, False, memory, slots, x)
    return x


def _move(
    rows: CacheRows, is_store: bool, memory: NDArray[np.uint8], slots: NDArray[np.int64], x: NDArray[np.float32]
) -> None:
    sizes = rows.n_head_kv, rows.head_dim, filled(rows.head_dim), rows.wide, rows.head_bytes, rows.group_bytes
    scratch = np.empty(scratch_bytes(rows.head_dim), np.uint8)
    kernel = _move_rows(format_id(rows.name), int(rows.is_v), is_store)
    kernel(memory, slots, np.array(sizes, np.int64), rows.rotates, rows.static, x, scratch)


def turn(rows_k: CacheRows, groups: NDArray[np.uint8], rotation: Rotation, distance: int, start: int = 0) -> None:
    """Turn the keys of groups, uint8[n_head_kv, n, bytes], by a distance of positions, from column `start` on."""
    rows = replace(rows_k, n_rows=groups.shape[1] * GROUP)
    memory, slots = groups.reshape(-1), np.arange(rows.n_rows)
    keys = load_rows(rows, memory, slots)
    part, half, angle = keys[..., start:], rotation.n_rot // 2, distance * rotation.inv_freq
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    first, second = slice(0, half), slice(half, 2 * half)
    if rotation.style != "neox":
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    a, b = part[..., first].copy(), part[..., second].copy()
    part[..., first], part[..., second] = a * cos - b * sin, a * sin + b * cos
    store_rows(rows, memory, slots, keys)
