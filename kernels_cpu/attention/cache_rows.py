"""Rows into and out of the layout of a cache (cache_types.py)."""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.compiler.deferred import COMPILING
from gguf_run.formats.compiler.jit import njit
from gguf_run.formats.frozen import frozen
from gguf_run.kernels_cpu.attention.cache_types import CACHE_FORMATS, CacheFormat
from gguf_run.models.backend import rotates
from gguf_run.models.kv_cache import GROUP

if COMPILING:
    from gguf_run.kernels_cpu.attention.cache_codec import encode
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
