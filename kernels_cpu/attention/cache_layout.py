"""Where the bits of a row are in a group of a cache (layout: cache_types.py): put_row and get_row."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gguf_run.kernels_cpu.attention.cache_types import FORMATS, CacheFormat
from gguf_run.kernels_cpu.panels.panels import PARTS, ROWS, FloatPanel, IntPanel
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


def _put(s: Simd, p: _Places) -> None:
    """Copy from the row into the group."""
    s.each(p.n, lambda i: s.store(s.load(p.row + i * p.row_step, p.element, p.lanes), p.group + i * p.group_step))


def _get(s: Simd, p: _Places) -> None:
    """Copy from the group to the row."""
    s.each(p.n, lambda i: s.store(s.load(p.group + i * p.group_step, p.element, p.lanes), p.row + i * p.row_step))


def _numbers(s: Simd, form: CacheFormat, is_v: bool, group: Val, row: Val, wide: Val, numbers: Val) -> list[_Places]:
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


def _floats(panel: FloatPanel, is_v: bool, at: Val, row: Val, wide: Val, codes: Val) -> _Places:
    """The elements of a row of floats: vectors of 16 columns of V, single columns of K. at: the group's elements."""
    size = panel.element_bytes
    if is_v:
        return _Places(wide >> 4, panel.element, ROWS, at + row * wide * size, ROWS * size, codes, ROWS * size)
    first = at + ((row >> 4) * wide * ROWS + (row & 15)) * size
    return _Places(wide, panel.element, 1, first, ROWS * size, codes, size)


# Integers of K. A row of K is a row of the panels: 4 bytes of each vector of a plane. at: the group's elements.


def _k_vectors(panel: IntPanel) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (vector i, bit of u, mask, plane, bit of the plane) for each part of u."""
    plane = bit = 0
    for width in PARTS[panel.bits]:
        for i in range(8):
            yield i, bit, ((1 << width) - 1) * _BYTES, plane + i % width, width * (i // width)
        plane, bit = plane + width, bit + width


def _k_first(panel: IntPanel, at: Val, row: Val, wide: Val) -> Val:
    """The address of a row's bytes in the first plane."""
    return at + (row >> 4) * (wide >> 5) * panel.span_bytes + (row & 15) * 4 + panel.quants_at


def _put_k(s: Simd, panel: IntPanel, at: Val, row: Val, wide: Val, codes: Val) -> None:
    first = _k_first(panel, at, row, wide)

    def block(b: Val) -> None:
        us = [s.load(codes + b * GROUP + 4 * i, I32) for i in range(8)]
        planes = [s.const(I32, 0) for _ in range(panel.bits)]
        for i, bit, mask, plane, left in _k_vectors(panel):
            planes[plane] = planes[plane] | ((us[i] >> bit) & mask) << left
        for n, plane_bytes in enumerate(planes):
            s.store(plane_bytes, first + b * panel.span_bytes + 64 * n)

    s.each(wide >> 5, block)


def _get_k(s: Simd, panel: IntPanel, at: Val, row: Val, wide: Val, codes: Val) -> None:
    first = _k_first(panel, at, row, wide)

    def block(b: Val) -> None:
        planes = [s.load(first + b * panel.span_bytes + 64 * n, I32) for n in range(panel.bits)]
        us = [s.const(I32, 0) for _ in range(8)]
        for i, bit, mask, plane, left in _k_vectors(panel):
            us[i] = us[i] | ((planes[plane] >> left) & mask) << bit
        for i, u in enumerate(us):
            s.store(u, codes + b * GROUP + 4 * i)

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


def _put_v(s: Simd, panel: IntPanel, at: Val, row: Val, wide: Val, codes: Val) -> None:
    parts = _v_parts(s, panel, at, row)

    def columns(g: Val) -> None:
        u = s.load(codes + g * ROWS, I8, ROWS).to(I32, signed=False)
        for place, bit, mask, left in parts:
            plane = place + g * (64 * panel.bits)
            kept = s.load(plane, I32, ROWS) & ((mask << left) ^ -1)
            s.store(kept | ((u >> bit) & mask) << left, plane)

    s.each(wide >> 4, columns)


def _get_v(s: Simd, panel: IntPanel, at: Val, row: Val, wide: Val, codes: Val) -> None:
    parts = _v_parts(s, panel, at, row)

    def columns(g: Val) -> None:
        u = s.const(I32, 0, ROWS)
        for place, bit, mask, left in parts:
            u = u | ((s.load(place + g * (64 * panel.bits), I32, ROWS) >> left) & mask) << bit
        s.store(u.to(I8), codes + g * ROWS)

    s.each(wide >> 4, columns)


def _move_row(
    s: Simd, form: int, is_v: int, group: Val, row: Val, wide: Val, codes: Val, numbers: Val, is_put: bool
) -> None:
    type, move = FORMATS[form], _put if is_put else _get
    for places in _numbers(s, type, bool(is_v), group, row, wide, numbers):
        move(s, places)
    at = group
    if is_v or not type.block:  # the numbers come first; those of K in blocks are in the panels
        at = group + (wide >> 5 if type.block else s.const(I64, 1)) * (2 * GROUP * type.n_numbers)
    if isinstance(type.panel, FloatPanel):
        move(s, _floats(type.panel, bool(is_v), at, row, wide, codes))
    else:
        move_integers = (_put_v if is_v else _put_k) if is_put else (_get_v if is_v else _get_k)
        move_integers(s, type.panel, at, row, wide, codes)


@simd_kernel
def put_row(s: Simd, form: int, is_v: int, group: Val, row: Val, wide: Val, codes: Val, numbers: Val) -> None:
    """Copy a row from codes and numbers (cache_codec.py) into a group.

    form: place in FORMATS. is_v: whether it is a row of V, else of K. group: address of the group. row: 0 to 31. wide:
    columns. The rows of V of one group share bytes: two threads must not put them at the same time.
    """
    _move_row(s, form, is_v, group, row, wide, codes, numbers, True)


@simd_kernel
def get_row(s: Simd, form: int, is_v: int, group: Val, row: Val, wide: Val, codes: Val, numbers: Val) -> None:
    """Copy a row from a group to codes and numbers: the reverse of put_row."""
    _move_row(s, form, is_v, group, row, wide, codes, numbers, False)
