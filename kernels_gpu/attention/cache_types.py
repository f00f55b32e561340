"""The table of KV cache types of a GPU, without torch or Triton. cache_rows.py stores and reads the rows."""

from dataclasses import dataclass

from gguf_run.formats.errors import OptionError
from gguf_run.kernels_gpu.panels.panels import PANELS, IntPanel
from gguf_run.models.backend import BLOCK
from gguf_run.models.pages import PAGE

SPAN = PAGE  # the most positions that attention reads at once; fewer divide a page


@dataclass(frozen=True)
class CacheFormat:
    """How rows of K or V are stored."""

    name: str
    bits: int  # of an element
    block: int | None = 0  # columns that share a scale; 0: there are no scales; None: all columns of a row
    panel: IntPanel | None = None  # whose units are the blocks

    def allows(self, head_dim: int) -> bool:
        """Return whether rows of head_dim columns are whole blocks."""
        return not self.block or head_dim % self.block == 0

    def n_numbers(self, head_dim: int) -> int:
        """Return how many f16 numbers a row has: scales, or pairs of a scale and a minimum."""
        if self.panel:
            return head_dim // BLOCK * self.panel.scale_bytes // 2
        return 1 if self.block is None else 0

    def row_bytes(self, head_dim: int) -> int:
        return head_dim * self.bits // 8 + 2 * self.n_numbers(head_dim)


def _blocks(name: str, panel: str = "") -> CacheFormat:
    form = PANELS[panel or name.upper()]
    assert isinstance(form, IntPanel)
    return CacheFormat(name, form.bits + form.high, BLOCK, form)


CACHE_FORMATS = {
    row.name: row
    for row in (
        CacheFormat("f32", 32),
        CacheFormat("f16", 16),
        CacheFormat("bf16", 16),
        _blocks("q8_0"),
        _blocks("q5_1"),
        _blocks("q5_0"),
        _blocks("q4_1"),
        _blocks("q4_0"),
        _blocks("iq4_nl"),
        CacheFormat("int8", 8, None),
        CacheFormat("fp8_e4m3", 8, None),
        CacheFormat("fp8_e5m2", 8, None),
        _blocks("int4", "Q4_0"),
    )
}


def cache_format(name: str, head_dim: int) -> CacheFormat:
    """Return a row of the table. OptionError if there is none, or if heads of head_dim columns are no whole blocks."""
    form = CACHE_FORMATS.get(name)
    if form is None:
        raise OptionError(f"cache type {name}: on a GPU there are {', '.join(CACHE_FORMATS)}; or use --device cpu")
    if not form.allows(head_dim):
        raise OptionError(f"cache type {name}: heads of {head_dim} columns are no whole blocks of {form.block}")
    return form
