"""The table of KV cache types that a GPU has, and the sizes of caches: what placement needs, without torch or Triton.

cache_types.py has how rows are stored and read.
"""

from dataclasses import dataclass

from gguf_run.formats.errors import OptionError

BLOCK = 32
GROUP = 32  # positions that are moved together, see models.kv_cache
SPAN = 64  # positions that attention takes at a time: no such step goes over the ring's end
_MOST_ROTATED_BITS = 8


@dataclass(frozen=True)
class CacheFormat:
    """bits: of an element. block: columns that share a scale: 0: there is none, None: all of a row."""

    name: str
    bits: int
    block: int | None = 0

    def allows(self, head_dim: int) -> bool:
        """Blocks must be whole."""
        return not self.block or head_dim % self.block == 0

    def n_scale(self, head_dim: int) -> int:
        """Scales of a row, f16."""
        return 1 if self.block is None else head_dim // self.block if self.block else 0

    def row_bytes(self, head_dim: int) -> int:
        return head_dim * self.bits // 8 + 2 * self.n_scale(head_dim)

    def rotates(self, head_dim: int, rotate: bool | None, has_scales: bool) -> bool:
        """rotate: models.backend.CacheType's; has_scales: static ones."""
        wanted = self.bits <= _MOST_ROTATED_BITS and not has_scales if rotate is None else rotate
        return wanted and head_dim % BLOCK == 0


CACHE_FORMATS = {
    row.name: row
    for row in (
        CacheFormat("f32", 32),
        CacheFormat("f16", 16),
        CacheFormat("bf16", 16),
        CacheFormat("q8_0", 8, BLOCK),
        CacheFormat("q4_0", 4, BLOCK),
        CacheFormat("int8", 8, None),
        CacheFormat("fp8_e4m3", 8, None),
        CacheFormat("fp8_e5m2", 8, None),
    )
}


def cache_format(name: str, head_dim: int) -> CacheFormat:
    """OptionError for a type that GPUs do not have, or that heads of head_dim columns cannot be stored as."""
    form = CACHE_FORMATS.get(name)
    if form is None:
        raise OptionError(f"cache type {name}: on a GPU there are {', '.join(CACHE_FORMATS)}; or use --device cpu")
    if not form.allows(head_dim):
        raise OptionError(f"cache type {name}: heads of {head_dim} columns are no whole blocks of {form.block}")
    return form


def cache_bytes(k: str, v: str, n_head_kv: int, head_dim: int, n_rows: int) -> int:
    """Bytes of one layer's cache of n_rows positions. A type that GPUs do not have takes none."""
    forms = (CACHE_FORMATS[name] for name in (k, v) if name in CACHE_FORMATS)
    return n_head_kv * n_rows * sum(form.row_bytes(head_dim) for form in forms)


def rows_stored(n_ctx: int, n_batch: int, window: int) -> int:
    """Positions of one sequence that a layer stores: all of them, or its window and a batch, and one more group, so
    that a batch can be taken back and what is left be saved, which goes by whole groups."""
    full = -(-n_ctx // SPAN) * SPAN
    return min(full, -(-(window + n_batch + GROUP) // SPAN) * SPAN) if window else full
