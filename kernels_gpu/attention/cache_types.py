"""The table of KV cache types of a GPU, which are the CPU's, without torch or Triton. cache_rows.py has the layout."""

from dataclasses import dataclass

from gguf_run.kernels_gpu.panels.panels import PANELS, IntPanel
from gguf_run.models.backend import BLOCK
from gguf_run.models.pages import PAGE

SPAN = PAGE  # the most positions that attention reads at once; fewer divide a page


@dataclass(frozen=True)
class CacheFormat:
    """How rows of K or V are stored."""

    name: str
    bits: int  # of an element
    panel: IntPanel | None = None  # whose units are blocks of 32 columns
    has_row_factor: bool = False  # all columns of a row share a scale

    def n_numbers(self, head_dim: int) -> int:
        """Return how many f16 numbers a row has: scales, or pairs of a scale and a minimum."""
        return head_dim // BLOCK * self.panel.scale_bytes // 2 if self.panel else int(self.has_row_factor)

    def row_bytes(self, head_dim: int) -> int:
        return head_dim * self.bits // 8 + 2 * self.n_numbers(head_dim)


def _blocks(name: str, panel: str = "") -> CacheFormat:
    form = PANELS[panel or name.upper()]
    assert isinstance(form, IntPanel)
    return CacheFormat(name, form.bits + form.high, form)


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
        CacheFormat("int8", 8, None, True),
        CacheFormat("fp8_e4m3", 8, None, True),
        CacheFormat("fp8_e5m2", 8, None, True),
        _blocks("int4", "Q4_0"),
    )
}
