"""Rows into and out of the layout of a cache (cache_types.py)."""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.compiler.deferred import COMPILING
from gguf_run.formats.compiler.jit import njit
from gguf_run.formats.frozen import frozen
from gguf_run.kernels_cpu.attention.cache_types import CACHE_FORMATS, CacheFormat, format_id
from gguf_run.models.kv_cache import GROUP, rotates

if COMPILING:
    from gguf_run.kernels_cpu.attention.cache_codec import decode, encode
    from gguf_run.kernels_cpu.attention.cache_layout import move_row
    from gguf_run.kernels_cpu.attention.hadamard import hadamard
    from gguf_run.kernels_cpu.vector.native import f32_at


def filled(head_dim: int) -> int:
    """Return the columns of a row in scratch memory: head_dim filled up to whole blocks."""
    return -(-head_dim // GROUP) * GROUP


def scratch_bytes(head_dim: int) -> int:
    """Return the bytes of scratch memory for a row: its f32 numbers, its codes, the numbers of its blocks."""
    return (4 + 4 + 1) * filled(head_dim)


@functools.cache
def store_row(form: int, is_v: int) -> Any:
    """Return the kernel that quantizes f32[n] at x into a row. n_wide: filled(n). wide: columns as stored."""

    @njit
    def store(x, n, n_wide, wide, rotate, static, group, row, scratch):
        source, copy = f32_at(x, n), f32_at(scratch, n_wide)
        for i in range(n):
            copy[i] = source[i]
        for i in range(n, n_wide):
            copy[i] = 0
        if rotate:
            hadamard(scratch, n)
        codes, numbers = scratch + 4 * n_wide, scratch + 8 * n_wide
        encode(form, scratch, n_wide, codes, numbers, np.float32(static))
        move_row(form, is_v, 1, group, row, wide, codes, numbers)

    return store


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


@frozen
class CacheRows:
    """The layout of K or V of one sequence in one layer, in memory u8[nbytes].

    memory.reshape(n_head_kv, n_rows / 32, -1) has the groups of 32 rows. A copy of whole groups copies their rows
    exactly, into another sequence or a file.
    """

    name: str  # of a row of CACHE_FORMATS
    is_v: bool
    n_head_kv: int
    head_dim: int
    n_rows: int  # rows of each KV head, a multiple of 32
    rotate: bool | None = None  # models.backend.CacheType.rotate
    scales: tuple[float, ...] | None = None  # static scales of the KV heads

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
        """Bytes of all rows of a KV head."""
        return self.n_rows // GROUP * self.group_bytes

    @property
    def nbytes(self) -> int:
        return self.n_head_kv * self.head_bytes

    @property
    def static(self) -> NDArray[np.float32]:
        """f32[n_head_kv]: the static scale of each KV head, or 0: each row has a scale of its own."""
        return np.array(self.scales or [0.0] * self.n_head_kv, np.float32)

    def fields(self, side: str) -> dict[str, Any]:
        """Return the fields of a kernel that describe k or v. Their names begin with `side`."""
        fields = {"wide": self.wide, "group": self.group_bytes, "rotate": self.rotates, "static": self.static}
        fields["at"] = self.form.elements_at(self.head_dim, self.is_v)
        return {f"{side}_{name}": value for name, value in fields.items()}

    def store(self, memory: NDArray[np.uint8], slots: NDArray[np.int64], x: NDArray[np.float32]) -> None:
        """Quantize rows, f32[n, n_head_kv, head_dim], into the rows with the numbers slots, i64[n]."""
        self._move(True, memory, slots, np.ascontiguousarray(x, np.float32))

    def load(self, memory: NDArray[np.uint8], slots: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the rows with the numbers slots, i64[n], as f32[n, n_head_kv, head_dim]."""
        x = np.empty((len(slots), self.n_head_kv, self.head_dim), np.float32)
        self._move(False, memory, slots, x)
        return x

    def _move(
        self, is_store: bool, memory: NDArray[np.uint8], slots: NDArray[np.int64], x: NDArray[np.float32]
    ) -> None:
        sizes = self.n_head_kv, self.head_dim, filled(self.head_dim), self.wide, self.head_bytes, self.group_bytes
        scratch = np.empty(scratch_bytes(self.head_dim), np.uint8)
        kernel = _move_rows(format_id(self.name), int(self.is_v), is_store)
        kernel(memory, slots, np.array(sizes, np.int64), self.rotates, self.static, x, scratch)
