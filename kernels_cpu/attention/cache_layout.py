"""Where the bits of a row are in a group of a cache (layout: cache_types.py)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gguf_run.kernels_cpu.attention.cache_types import FORMATS, CacheFormat
from gguf_run.kernels_cpu.panels.panels import ROWS, FloatPanel, IntPanel
from gguf_run.kernels_cpu.panels.planes import PARTS, bit_places
from gguf_run.kernels_cpu.vector.lowering import simd_kernel
from gguf_run.kernels_cpu.vector.simd import I8, I16, I32, I64, Simd, Val
from gguf_run.models.kv_cache import GROUP

_BYTES = 0x01010101  # a mask for one byte becomes a mask for four


def _log2(power: int) -> int:
    return power.bit_length() - 1


@dataclass(frozen=True)
class _Places:
    """Equal vectors of a row: where they are in a group, and where they are in codes or numbers."""

    n: Val
    element: Any  # LLVM's type
    lanes: int
    group: Val  # address of the first
    group_step: int  # bytes from one to the next
    row: Val
    row_step: int


def _copy(s: Simd, p: _Places, is_put: int) -> None:
    """Copy from the row into the group, or back."""

    def vector(i: Val) -> None:
        group, row = p.group + i * p.group_step, p.row + i * p.row_step
        source, target = (row, group) if is_put else (group, row)
        s.store(s.load(source, p.element, p.lanes), target)

    s.each(p.n, vector)


def _numbers(s: Simd, form: CacheFormat, is_v: int, group: Val, row: Val, wide: Val, numbers: Val) -> list[_Places]:
    """The f16 numbers of a row: the scales of its blocks, then their minimums."""
    count, panel = form.n_numbers, form.panel
    if form.block and not is_v:
        assert isinstance(panel, IntPanel)
        first = group + (row >> 4) * (wide >> 5) * panel.span_bytes + (row & 15) * 2
        block_step, step = panel.span_bytes, 2 * ROWS
    else:
        first, block_step, step = group + row * 2, 2 * GROUP * count, 2 * GROUP
    n = wide >> 5 if form.block else s.const(I64, 1)
    return [_Places(n, I16, 1, first + i * step, block_step, numbers + 2 * i, 2 * count) for i in range(count)]


def _floats(panel: FloatPanel, is_v: int, at: Val, row: Val, wide: Val, codes: Val) -> _Places:
    """The elements of a row of floats: vectors of 16 columns of V, single columns of K. at: the group's elements."""
    size = panel.element_bytes
    if is_v:
        return _Places(wide >> 4, panel.element, ROWS, at + row * wide * size, ROWS * size, codes, ROWS * size)
    first = at + ((row >> 4) * wide * ROWS + (row & 15)) * size
    return _Places(wide, panel.element, 1, first, ROWS * size, codes, size)


# Integers of K. A row of K is a row of the panels: 4 bytes of each vector of a plane. at: the group's elements.


def _k_vectors(panel: IntPanel) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (vector i, bit of u, mask, plane, bit of the plane) for each part of u."""
    for i in range(8):
        for plane, at, bit, mask in bit_places(panel, i):
            yield i, bit, mask * _BYTES, plane, at


def _move_k(s: Simd, panel: IntPanel, at: Val, row: Val, wide: Val, codes: Val, is_put: int) -> None:
    first = at + (row >> 4) * (wide >> 5) * panel.span_bytes + (row & 15) * 4 + panel.quants_at

    def block(b: Val) -> None:
        us = [codes + b * GROUP + 4 * i for i in range(8)]
        planes = [first + b * panel.span_bytes + 64 * n for n in range(panel.bits)]
        source, target = (us, planes) if is_put else (planes, us)
        stored = [s.load(place, I32) for place in source]
        made = [s.const(I32, 0) for _ in target]
        for i, bit, mask, plane, left in _k_vectors(panel):
            if is_put:
                made[plane] = made[plane] | ((stored[i] >> bit) & mask) << left
            else:
                made[i] = made[i] | ((stored[plane] >> left) & mask) << bit
        for value, place in zip(made, target, strict=True):
            s.store(value, place)

    s.each(wide >> 5, block)


# Integers of V. A row of V is a column of the panels: some bits of one of every 4 bytes. at: the group's elements.


def _v_parts(s: Simd, panel: IntPanel, at: Val, row: Val) -> list[tuple[Val, int, Val, Val]]:
    """Return (address of a plane of 16 columns, bit of u, mask, bit of 4 bytes of the plane) for each part of u."""
    low = row & 15
    vector, byte = low >> 1, (row & 1) + ((row >> 4) << 1)  # see V_ORDER
    parts, plane, bit = [], 0, 0
    for width in PARTS[panel.bits]:
        left = s.splat(((byte << 3) + (vector >> _log2(width)) * width).to(I32), ROWS)
        place = at + ((vector & (width - 1)) + plane) * 64
        parts.append((place, bit, s.const(I32, (1 << width) - 1, ROWS), left))
        plane, bit = plane + width, bit + width
    return parts


def _move_v(s: Simd, panel: IntPanel, at: Val, row: Val, wide: Val, codes: Val, is_put: int) -> None:
    parts = _v_parts(s, panel, at, row)

    def columns(g: Val) -> None:
        u = s.load(codes + g * ROWS, I8, ROWS).to(I32, signed=False) if is_put else s.const(I32, 0, ROWS)
        for place, bit, mask, left in parts:
            plane = place + g * (64 * panel.bits)
            stored = s.load(plane, I32, ROWS)
            if is_put:
                s.store((stored & ((mask << left) ^ -1)) | ((u >> bit) & mask) << left, plane)
            else:
                u = u | ((stored >> left) & mask) << bit
        if not is_put:
            s.store(u.to(I8), codes + g * ROWS)

    s.each(wide >> 4, columns)


@simd_kernel
def move_row(
    s: Simd, form: int, is_v: int, is_put: int, group: Val, row: Val, wide: Val, codes: Val, numbers: Val
) -> None:
    """Copy a row from codes and numbers (cache_codec.py) into a group if is_put is 1, back if it is 0.

    form: place in FORMATS. is_v: whether it is a row of V, else of K. group: address of the group. row: 0 to 31. wide:
    columns. The rows of V of one group share bytes: two threads must not put them at the same time.
    """
    type = FORMATS[form]
    for places in _numbers(s, type, is_v, group, row, wide, numbers):
        _copy(s, places, is_put)
    at = group
    if is_v or not type.block:  # the numbers come first; those of K in blocks are in the panels
        at = group + (wide >> 5 if type.block else s.const(I64, 1)) * (2 * GROUP * type.n_numbers)
    if isinstance(type.panel, FloatPanel):
        _copy(s, _floats(type.panel, is_v, at, row, wide, codes), is_put)
    else:
        (_move_v if is_v else _move_k)(s, type.panel, at, row, wide, codes, is_put)
