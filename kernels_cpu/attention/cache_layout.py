"""Where the bits of a row are in a group of a cache (layout: cache_types.py): put_row and get_row."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gguf_run.formats.compiler.jit import intrinsic, types
from gguf_run.kernels_cpu.attention.cache_types import FORMATS, GROUP, CacheFormat
from gguf_run.kernels_cpu.panels.panels import PARTS, ROWS, FloatPanel, IntPanel
from gguf_run.kernels_cpu.vector.lowering import kernel
from gguf_run.kernels_cpu.vector.simd import I8, I16, I32, I64, Simd, Val

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

    def put(self, s: Simd) -> None:
        """Copy from the row into the group."""
        self._copy(s, self.row, self.row_step, self.group, self.group_step)

    def get(self, s: Simd) -> None:
        """Copy from the group to the row."""
        self._copy(s, self.group, self.group_step, self.row, self.row_step)

    def _copy(self, s: Simd, source: Val, source_step: int, to: Val, to_step: int) -> None:
        def body(i: Val) -> None:
            s.store(s.load(source + i * source_step, self.element, self.lanes), to + i * to_step)

        s.each(self.n, body)


def _numbers(s: Simd, form: CacheFormat, is_v: bool, group: Val, row: Val, wide: Val, numbers: Val) -> list[_Places]:
    """The f16 numbers of a row: the scales of its blocks, and their minimums."""
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
    """The elements of a row of floats: single columns of K, vectors of 16 columns of V. at: the group's elements."""
    size = panel.element_bytes
    if is_v:
        return _Places(wide >> 4, panel.element, ROWS, at + row * wide * size, ROWS * size, codes, ROWS * size)
    first = at + ((row >> 4) * wide * ROWS + (row & 15)) * size
    return _Places(wide, panel.element, 1, first, ROWS * size, codes, size)


def _k_vectors(panel: IntPanel) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (plane, bit of u, mask, vector, its bit in the plane): a row has 4 bytes of each vector of a plane."""
    plane = bit = 0
    for width in PARTS[panel.bits]:
        for i in range(8):
            yield plane + i % width, bit, ((1 << width) - 1) * _BYTES, i, width * (i // width)
        plane, bit = plane + width, bit + width


def _k_blocks(
    s: Simd, panel: IntPanel, at: Val, row: Val, wide: Val, codes: Val, body: Callable[[Val, Val], None]
) -> None:
    """body(the row's first plane, its codes) for each block of 32 columns. at: the group's elements."""
    first = at + (row >> 4) * (wide >> 5) * panel.span_bytes + (row & 15) * 4 + panel.quants_at

    def block(b: Val) -> None:
        body(first + b * panel.span_bytes, codes + b * GROUP)

    s.each(wide >> 5, block)


def _put_k(s: Simd, panel: IntPanel, at: Val, row: Val, wide: Val, codes: Val) -> None:
    def block(planes: Val, codes: Val) -> None:
        us = [s.load(codes + 4 * i, I32) for i in range(8)]
        stored = [s.const(I32, 0) for _ in range(panel.bits)]
        for plane, bit, mask, i, left in _k_vectors(panel):
            stored[plane] = stored[plane] | ((us[i] >> bit) & mask) << left
        for plane, value in enumerate(stored):
            s.store(value, planes + 64 * plane)

    _k_blocks(s, panel, at, row, wide, codes, block)


def _get_k(s: Simd, panel: IntPanel, at: Val, row: Val, wide: Val, codes: Val) -> None:
    def block(planes: Val, codes: Val) -> None:
        stored = [s.load(planes + 64 * plane, I32) for plane in range(panel.bits)]
        us = [s.const(I32, 0) for _ in range(8)]
        for plane, bit, mask, i, left in _k_vectors(panel):
            us[i] = us[i] | ((stored[plane] >> left) & mask) << bit
        for i, u in enumerate(us):
            s.store(u, codes + 4 * i)

    _k_blocks(s, panel, at, row, wide, codes, block)


_Part = tuple[Val, int, Val, Val]  # address of a plane, bit of u, mask, bit of the row in the plane's bytes


def _v_columns(
    s: Simd, panel: IntPanel, at: Val, row: Val, wide: Val, codes: Val, body: Callable[[list[_Part], Val], None]
) -> None:
    """Call body(parts of u, codes) for each 16 columns. A row of V is a column of the panel: bits of every 4th byte.

    at: the group's elements.
    """
    low = row & 15
    vector, byte = low >> 1, (row & 1) + ((row >> 4) << 1)  # see V_ORDER

    def columns(g: Val) -> None:
        parts, plane, bit = [], 0, 0
        for width in PARTS[panel.bits]:
            place = at + g * (64 * panel.bits) + ((vector & (width - 1)) + plane) * 64
            left = s.splat(((byte << 3) + (vector >> _log2(width)) * width).to(I32), ROWS)
            parts.append((place, bit, s.const(I32, (1 << width) - 1, ROWS), left))
            plane, bit = plane + width, bit + width
        body(parts, codes + g * ROWS)

    s.each(wide >> 4, columns)


def _put_v(s: Simd, panel: IntPanel, at: Val, row: Val, wide: Val, codes: Val) -> None:
    def columns(parts: list[_Part], codes: Val) -> None:
        u = s.load(codes, I8, ROWS).to(I32, signed=False)
        for place, bit, mask, left in parts:
            kept = s.load(place, I32, ROWS) & ((mask << left) ^ -1)
            s.store(kept | ((u >> bit) & mask) << left, place)

    _v_columns(s, panel, at, row, wide, codes, columns)


def _get_v(s: Simd, panel: IntPanel, at: Val, row: Val, wide: Val, codes: Val) -> None:
    def columns(parts: list[_Part], codes: Val) -> None:
        u = s.const(I32, 0, ROWS)
        for place, bit, mask, left in parts:
            u = u | ((s.load(place, I32, ROWS) >> left) & mask) << bit
        s.store(u.to(I8), codes)

    _v_columns(s, panel, at, row, wide, codes, columns)


def _mover(form: Any, is_v: Any, of_floats: Callable[[_Places, Simd], None], of_k: Any, of_v: Any) -> Any:
    """Return what put_row or get_row must return: of_floats moves floats and numbers, of_k and of_v move integers."""
    type, of_values = FORMATS[form.literal_value], bool(is_v.literal_value)

    def emit(s: Simd, group: Val, row: Val, wide: Val, codes: Val, numbers: Val) -> None:
        for places in _numbers(s, type, of_values, group, row, wide, numbers):
            of_floats(places, s)
        at = group
        if of_values or not type.block:  # the numbers stand in front; those of K in blocks stand in the panels
            at = group + (wide >> 5 if type.block else s.const(I64, 1)) * (2 * GROUP * type.n_numbers)
        if isinstance(type.panel, FloatPanel):
            of_floats(_floats(type.panel, of_values, at, row, wide, codes), s)
        else:
            (of_v if of_values else of_k)(s, type.panel, at, row, wide, codes)

    return kernel(types.void(form, is_v, *[types.intp] * 5), emit)


@intrinsic(prefer_literal=True)
def put_row(typing_context, form, is_v, group, row, wide, codes, numbers):
    """Copy a row from codes and numbers (cache_codec.py) into a group.

    form, is_v: literal. group: address of the group. row: 0 to 31. wide: columns. The rows of V of one group share
    bytes: two threads must not put them at the same time.
    """
    return _mover(form, is_v, _Places.put, _put_k, _put_v)


@intrinsic(prefer_literal=True)
def get_row(typing_context, form, is_v, group, row, wide, codes, numbers):
    """Copy a row from a group to codes and numbers: the reverse of put_row."""
    return _mover(form, is_v, _Places.get, _get_k, _get_v)
