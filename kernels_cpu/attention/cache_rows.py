"""Rows into and out of the layout of a cache (cache_types.py): what appends to it, and what moves or turns rows."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.compiler.jit import intrinsic, njit, types
from gguf_run.kernels_cpu.attention.cache_codec import decode, encode
from gguf_run.kernels_cpu.attention.cache_types import CACHE_FORMATS, FORMATS, CacheFormat, format_id
from gguf_run.kernels_cpu.attention.hadamard import hadamard
from gguf_run.kernels_cpu.panels.panels import PARTS, ROWS, FloatPanel, IntPanel
from gguf_run.kernels_cpu.vector.native import f32_at
from gguf_run.kernels_cpu.vector.simd import I8, I16, I32, I64, Simd, Val, kernel
from gguf_run.models.kv_cache import GROUP, rotates

_BYTES = 0x01010101


def _log2(power: int) -> int:
    return power.bit_length() - 1


def _copy(s: Simd, n: Val, element: Any, source: Val, step: int, to: Val, to_step: int, lanes: int = 1) -> None:
    def body(i: Val, none: list[Val]) -> list[Val]:
        s.store(s.load(source + i * step, element, lanes), to + i * to_step)
        return none

    s.loop(n, [], body)


def _numbers(s: Simd, form: CacheFormat, is_v: bool, group: Val, row: Val, wide: Val, numbers: Val, get: bool) -> None:
    """Move a row's f16 numbers between `numbers` and the group."""
    count, panel = form.n_numbers, form.panel
    if form.block and not is_v:
        assert isinstance(panel, IntPanel)
        first = group + (row >> 4) * (wide >> 5) * panel.span_bytes + (row & 15) * 2
        block_step, step = panel.span_bytes, 2 * ROWS
    else:
        first, block_step, step = group + row * 2, 2 * GROUP * count, 2 * GROUP
    blocks = wide >> 5 if form.block else s.const(I64, 1)
    for i in range(count):
        there, here = (first + i * step, block_step), (numbers + 2 * i, 2 * count)
        _copy(s, blocks, I16, *(there + here if get else here + there))


def _k_elements(s: Simd, form: CacheFormat, at: Val, row: Val, wide: Val, codes: Val, get: bool) -> None:
    """at: the group's elements. Integers: a row has 4 bytes, 4 columns, of each vector of a plane."""
    panel = form.panel
    if isinstance(panel, FloatPanel):
        size = panel.element_bytes
        there = at + ((row >> 4) * wide * ROWS + (row & 15)) * size, ROWS * size
        _copy(s, wide, panel.element, *((*there, codes, size) if get else (codes, size, *there)))
        return
    first = at + (row >> 4) * (wide >> 5) * panel.span_bytes + (row & 15) * 4 + panel.quants_at

    def block(b: Val, none: list[Val]) -> list[Val]:
        planes, here = first + b * panel.span_bytes, codes + b * GROUP
        us = [s.const(I32, 0) if get else s.load(here + 4 * i, I32) for i in range(8)]
        plane = bit = 0
        for width in PARTS[panel.bits]:
            mask = ((1 << width) - 1) * _BYTES
            for p in range(width):
                place, stored = planes + 64 * (plane + p), s.const(I32, 0)
                if get:
                    stored = s.load(place, I32)
                for i in range(p, 8, width):
                    left = width * (i // width)
                    if get:
                        us[i] = us[i] | ((stored >> left) & mask) << bit
                    else:
                        stored = stored | ((us[i] >> bit) & mask) << left
                if not get:
                    s.store(stored, place)
            plane, bit = plane + width, bit + width
        for i in range(8 if get else 0):
            s.store(us[i], here + 4 * i)
        return none

    s.loop(wide >> 5, [], block)


def _v_elements(s: Simd, form: CacheFormat, at: Val, row: Val, wide: Val, codes: Val, get: bool) -> None:
    """at: the group's elements. Integers: the row is one column of the panels, a few bits of every 4 bytes."""
    panel = form.panel
    if isinstance(panel, FloatPanel):
        size, n = panel.element_bytes, wide >> 4
        there = at + row * wide * size, ROWS * size
        step = (codes, ROWS * size)
        _copy(s, n, panel.element, *(there + step if get else step + there), ROWS)
        return
    low = row & 15
    vector, byte = low >> 1, (row & 1) + ((row >> 4) << 1)  # see V_ORDER

    def columns(g: Val, none: list[Val]) -> list[Val]:
        planes, here = at + g * (64 * panel.bits), codes + g * ROWS
        u = s.const(I32, 0, ROWS) if get else s.load(here, I8, ROWS).to(I32, signed=False)
        plane = bit = 0
        for width in PARTS[panel.bits]:
            mask = s.const(I32, (1 << width) - 1, ROWS)
            place = planes + ((vector & (width - 1)) + plane) * 64
            left = s.splat(((byte << 3) + (vector >> _log2(width)) * width).to(I32), ROWS)
            stored = s.load(place, I32, ROWS)
            if get:
                u = u | ((stored >> left) & mask) << bit
            else:
                s.store((stored & ((mask << left) ^ -1)) | ((u >> bit) & mask) << left, place)
            plane, bit = plane + width, bit + width
        if get:
            s.store(u.to(I8), here)
        return none

    s.loop(wide >> 4, [], columns)


@intrinsic(prefer_literal=True)
def move_row(
    typing_context: Any, form: Any, is_v: Any, get: Any, group: Any, row: Any, wide: Any, codes: Any, numbers: Any
) -> Any:
    """Copy a row from codes and numbers (cache_codec.py) into a group, or with get = 1 from there.

    form, is_v, get: literal; group: address of the group; row: 0 .. 31; wide: columns. Rows of V of one group have bits
    of the same bytes, so two threads must not put them at the same time.
    """
    type, of_v, from_group = FORMATS[form.literal_value], bool(is_v.literal_value), bool(get.literal_value)

    def emit(s: Simd, group: Val, row: Val, wide: Val, codes: Val, numbers: Val) -> None:
        _numbers(s, type, of_v, group, row, wide, numbers, from_group)
        head = s.const(I64, 0)
        if not (type.block and not of_v):  # K in blocks has its numbers in the panels
            blocks = wide >> 5 if type.block else s.const(I64, 1)
            head = blocks * (2 * GROUP * type.n_numbers)
        (_v_elements if of_v else _k_elements)(s, type, group + head, row, wide, codes, from_group)

    return kernel(types.void(form, is_v, get, *[types.intp] * 5), emit)


def filled(head_dim: int) -> int:
    """Columns of a row in scratch memory: filled up to whole blocks."""
    return -(-head_dim // GROUP) * GROUP


def scratch_bytes(head_dim: int) -> int:
    """Bytes of scratch memory of a row: itself in f32, its codes, its numbers."""
    return (4 + 4 + 1) * filled(head_dim)


@functools.cache
def store_row(form: int, is_v: int) -> Any:
    """The function that quantizes f32[n] at x into row `row` of a group. n_wide: filled(n); wide: columns as stored."""

    @njit
    def store(x, n, n_wide, wide, rotate, static, group, row, scratch):  # type: ignore[no-untyped-def]
        source, copy = f32_at(x, n), f32_at(scratch, n_wide)
        for i in range(n):
            copy[i] = source[i]
        for i in range(n, n_wide):
            copy[i] = 0
        if rotate:
            hadamard(scratch, n)
        codes, numbers = scratch + 4 * n_wide, scratch + 8 * n_wide
        encode(form, scratch, n_wide, codes, numbers, np.float32(static))
        move_row(form, is_v, 0, group, row, wide, codes, numbers)

    return store


@functools.cache
def _store_rows(form: int, is_v: int) -> Any:
    store = store_row(form, is_v)

    @njit
    def store_rows(data, slots, sizes, rotate, scales, x, scratch):  # type: ignore[no-untyped-def]
        n_head, n, n_wide, wide, head_bytes, group_bytes = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]
        for i in range(len(slots)):
            for head in range(n_head):
                group = data.ctypes.data + head * head_bytes + slots[i] // GROUP * group_bytes
                at = x.ctypes.data + (i * n_head + head) * n * 4
                store(at, n, n_wide, wide, rotate, scales[head], group, slots[i] % GROUP, scratch.ctypes.data)

    return store_rows


@functools.cache
def _load_rows(form: int, is_v: int) -> Any:
    @njit
    def load_rows(data, slots, sizes, rotate, x, scratch):  # type: ignore[no-untyped-def]
        n_head, n, n_wide, wide, head_bytes, group_bytes = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]
        values = scratch.ctypes.data
        codes, numbers = values + 4 * n_wide, values + 8 * n_wide
        for i in range(len(slots)):
            for head in range(n_head):
                group = data.ctypes.data + head * head_bytes + slots[i] // GROUP * group_bytes
                move_row(form, is_v, 1, group, slots[i] % GROUP, wide, codes, numbers)
                decode(form, codes, numbers, n_wide, values)
                if rotate:
                    hadamard(values, n)
                x[i, head] = f32_at(values, n)

    return load_rows


@dataclass(frozen=True)
class CacheRows:
    """K or V of one sequence in one layer: memory u8[nbytes] with n_rows rows (a multiple of 32) of each KV head.

    Groups of 32 rows stand together: memory.reshape(n_head_kv, n_rows / 32, -1) is theirs, and copying whole groups
    copies rows exactly, for another sequence or for a file. Slots are row numbers, i64[n].
    """

    name: str
    is_v: bool
    n_head_kv: int
    head_dim: int
    n_rows: int
    rotate: bool | None = None
    scales: tuple[float, ...] | None = None

    @property
    def form(self) -> CacheFormat:
        return CACHE_FORMATS[self.name]

    @property
    def rotates(self) -> bool:
        """Whether rows go through the Hadamard transform."""
        return rotates(self.form.bits, self.head_dim, self.rotate, self.scales is not None)

    @property
    def wide(self) -> int:
        return self.form.wide(self.head_dim, self.is_v)

    @property
    def group_bytes(self) -> int:
        return self.form.group_bytes(self.head_dim, self.is_v)

    @property
    def head_bytes(self) -> int:
        """Bytes of all rows of a head."""
        return self.n_rows // GROUP * self.group_bytes

    @property
    def nbytes(self) -> int:
        return self.n_head_kv * self.head_bytes

    @property
    def static(self) -> NDArray[np.float32]:
        """f32[n_head_kv]: the scale of each head's rows, 0 where it is found anew for each row."""
        return np.array(self.scales or [0.0] * self.n_head_kv, np.float32)

    def store(self, memory: NDArray[np.uint8], slots: NDArray[np.int64], x: NDArray[np.float32]) -> None:
        """Quantize rows, f32[n, n_head_kv, head_dim], into the slots."""
        x = np.ascontiguousarray(x, np.float32)
        self._kernel(_store_rows)(memory, slots, self._sizes, self.rotates, self.static, x, self._scratch)

    def load(self, memory: NDArray[np.uint8], slots: NDArray[np.int64]) -> NDArray[np.float32]:
        """The slots' rows as f32[n, n_head_kv, head_dim], as near as they were kept to what was stored."""
        x = np.empty((len(slots), self.n_head_kv, self.head_dim), np.float32)
        self._kernel(_load_rows)(memory, slots, self._sizes, self.rotates, x, self._scratch)
        return x

    def _kernel(self, make: Callable[[int, int], Any]) -> Any:
        return make(format_id(self.name), int(self.is_v))

    @property
    def _sizes(self) -> NDArray[np.int64]:
        sizes = self.n_head_kv, self.head_dim, filled(self.head_dim), self.wide, self.head_bytes, self.group_bytes
        return np.array(sizes, np.int64)

    @property
    def _scratch(self) -> NDArray[np.uint8]:
        return np.empty(scratch_bytes(self.head_dim), np.uint8)
