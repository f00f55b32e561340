"""What the GPU backend's handles are: weights as panels, buffers of rows."""

from dataclasses import dataclass

import torch
from torch import Tensor as Array

from gguf_run.kernels_gpu.panels.panels import FACTOR, IntPanel, Panel

ROWS = 32  # buffers have a multiple of this many rows, so that kernels for a few tokens need no masks


def padded(n_row: int) -> int:
    """Rows of memory for n_row rows."""
    return -(-n_row // ROWS) * ROWS


@dataclass(frozen=True, eq=False)
class WeightPart:
    """Rows of a matrix in one panel: planes of uint8[n_out, bytes of a row]; high and d may be None."""

    panel: Panel
    n_in: int
    n_out: int
    qs: Array
    high: Array | None = None
    scale: Array | None = None
    d: Array | None = None

    @property
    def planes(self) -> list[Array]:
        return [plane for plane in (self.qs, self.high, self.scale, self.d) if plane is not None]

    @property
    def n_unit(self) -> int:
        """Units of a row."""
        return -(-self.n_in // self.panel.unit)

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes)


def empty(panel: Panel, n_in: int, n_out: int, device: torch.device) -> WeightPart:
    """Memory for a matrix; the columns that a row is filled up with are 0."""
    if not isinstance(panel, IntPanel):
        return WeightPart(
            panel, n_in, n_out, torch.zeros(n_out, panel.row_bytes(n_in), dtype=torch.uint8, device=device)
        )
    n_unit = n_in // panel.unit
    widths = [n_unit * n for n in (panel.qs_bytes, panel.high_bytes, panel.scale_bytes)]
    widths.append(n_in // FACTOR * panel.d_bytes)
    planes = (torch.empty(n_out, n, dtype=torch.uint8, device=device) if n else None for n in widths)
    qs, *others = planes
    assert qs is not None
    return WeightPart(panel, n_in, n_out, qs, *others)


@dataclass(frozen=True, eq=False)
class GpuWeight:
    """A matrix as parts, one for each run of rows of one tensor type."""

    n_in: int
    parts: tuple[WeightPart, ...]

    @property
    def n_out(self) -> int:
        return sum(part.n_out for part in self.parts)


@dataclass(frozen=True, eq=False)
class GpuBuffer:
    """Columns of f32 rows; after: of the rows whose results are wanted, else of all tokens."""

    memory: Array
    after: bool
    start: int
    width: int

    def columns(self, start: int, width: int) -> "GpuBuffer":
        return GpuBuffer(self.memory, self.after, self.start + start, width)

    @property
    def data(self) -> Array:
        """f32[rows, width], a view."""
        return self.memory[:, self.start : self.start + self.width]

    @property
    def stride(self) -> int:
        return self.memory.stride(0)
