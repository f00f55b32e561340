"""The table of KV cache types: how K and V of a position are stored, and in how many bytes.

K and V of a head are sequences of groups of 32 positions. A position is a row of `wide` columns: head_dim, filled up to
a multiple of 32 unless the type is a float. Scales are f16. ggml's types have a scale, and some a minimum, for each
block of 32 columns. int8 and fp8 have one scale for a row, which is a token's row of one KV head.

    K  blocks   [2][wide / 32] spans of an integer panel (panels/panels.py), rows are 16 positions: q.k is a matmul tile
       others   scales [32] f16, if any; [2][wide][16] elements
    V  blocks   scales [wide / 32][1 or 2][32] f16; [wide / 16][planes][16][4] u8: an integer panel whose rows are the
                columns, and whose columns are positions in the order of `V_ORDER`
       int8     the same with scales [32] f16
       others   scales [32] f16, if any; [32][wide] elements

The order of V's positions puts pairs of 16 bits of positions l and l + 16 side by side: see int_tiles.py.
"""

from gguf_run.formats.frozen import frozen
from gguf_run.kernels_cpu.panels.panels import CACHE_PANELS, PLAIN_PANELS, IntPanel, PlainPanel
from gguf_run.models.backend import BLOCK
from gguf_run.models.kv_cache import GROUP

# Byte c of V's vector i (column 4i + c of the panel) is this position of the group.
V_ORDER = tuple(2 * i + c % 2 + 16 * (c // 2) for i in range(8) for c in range(4))


@frozen
class CacheFormat:
    """One cache type."""

    name: str
    bits: int  # of an element
    panel: PlainPanel  # of K; the form of V's elements
    block: int | None = 0  # columns that share a scale; 0: there is no scale, None: all columns of a row
    largest: float = 0.0  # the stored form of the largest number of a row, if a row has one scale

    @property
    def is_integer(self) -> bool:
        return isinstance(self.panel, IntPanel)

    @property
    def n_numbers(self) -> int:
        """How many f16 numbers a block has: 0, 1 (its scale) or 2 (scale and minimum)."""
        return 0 if self.block == 0 else 1 + (isinstance(self.panel, IntPanel) and self.panel.has_minimum)

    def wide(self, head_dim: int, is_v: bool) -> int:
        """Return the columns of a row as stored: filled up to a multiple of 32 for integers, and for V."""
        return -(-head_dim // BLOCK) * BLOCK if is_v or self.is_integer else head_dim

    def n_blocks(self, wide: int) -> int:
        """Return how many blocks of a row of `wide` columns have numbers of their own."""
        return wide // self.block if self.block else 1

    def group_bytes(self, head_dim: int, is_v: bool) -> int:
        """Return the bytes of a group of one KV head."""
        wide = self.wide(head_dim, is_v)
        return GROUP * (2 * self.n_numbers * self.n_blocks(wide) + wide * self.bits // 8)

    def elements_at(self, head_dim: int, is_v: bool) -> int:
        """Return the bytes of a group before its elements: its numbers. Those of K in blocks are in the panels."""
        return 2 * GROUP * self.n_numbers * self.n_blocks(self.wide(head_dim, is_v)) if is_v or not self.block else 0

    def allows(self, head_dim: int) -> bool:
        """Whether a head is whole blocks."""
        return not self.block or head_dim % self.block == 0


def _blocks(name: str, bits: int, panel: str = "") -> CacheFormat:
    return CacheFormat(name, bits, PLAIN_PANELS[panel or name.upper()], BLOCK)


CACHE_FORMATS = {
    row.name: row
    for row in (
        CacheFormat("f32", 32, PLAIN_PANELS["F32"]),
        CacheFormat("f16", 16, PLAIN_PANELS["F16"]),
        CacheFormat("bf16", 16, PLAIN_PANELS["BF16"]),
        _blocks("q8_0", 8),
        _blocks("q5_1", 5),
        _blocks("q5_0", 5),
        _blocks("q4_1", 4),
        _blocks("q4_0", 4),
        _blocks("iq4_nl", 4),
        CacheFormat("int8", 8, CACHE_PANELS["INT8"], None, 127.0),
        CacheFormat("fp8_e4m3", 8, CACHE_PANELS["E4M3"], None, 448.0),
        CacheFormat("fp8_e5m2", 8, CACHE_PANELS["E5M2"], None, 57344.0),
        _blocks("int4", 4, "Q4_0"),
    )
}
# Kernels are compiled for a type given as a literal integer: its place in this list.
FORMATS = tuple(CACHE_FORMATS.values())


def format_id(name: str) -> int:
    """Return a type's place in FORMATS, the compile-time constant of its kernels."""
    return FORMATS.index(CACHE_FORMATS[name])


def cache_bytes(k: str, v: str, n_head_kv: int, head_dim: int, n_ctx: int, n_latent: int = 0) -> int:
    """Return the bytes of one layer's cache of the types k and v. n_ctx positions are filled up to whole groups.

    n_latent: as in operands.AttentionShape. If it is not 0, there is no V.
    """
    k_bytes = CACHE_FORMATS[k].group_bytes(head_dim, False)
    v_bytes = 0 if n_latent else CACHE_FORMATS[v].group_bytes(head_dim, True)
    return n_head_kv * -(-n_ctx // GROUP) * (k_bytes + v_bytes)
