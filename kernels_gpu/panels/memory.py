"""The handles of the GPU backend: weights as panels, experts, sums of squares."""

from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor as Array

from gguf_run.formats.errors import UnsupportedError
from gguf_run.kernels_gpu.panels.panels import FACTOR, IntPanel, Panel

Planes = tuple[Array, Array | None, Array | None, Array | None]


@dataclass(frozen=True, eq=False)
class WeightPart:
    """Rows of a matrix in one panel: planes of uint8[n_out, bytes of a row] (panels.py)."""

    panel: Panel
    n_in: int
    n_out: int
    qs: Array
    high: Array | None = None
    scale: Array | None = None
    d: Array | None = None

    @property
    def w(self) -> Planes:
        """All planes, as kernels take them."""
        return self.qs, self.high, self.scale, self.d

    @property
    def planes(self) -> list[Array]:
        """The planes that the panel has."""
        return [plane for plane in self.w if plane is not None]

    @property
    def is_int(self) -> bool:
        return isinstance(self.panel, IntPanel)

    @property
    def n_unit(self) -> int:
        """Units of a row."""
        return -(-self.n_in // self.panel.unit)

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes)


def empty(panel: Panel, n_in: int, n_out: int, device: torch.device) -> WeightPart:
    """Return memory for a matrix. The columns that fill up a row of floats are 0."""
    if not isinstance(panel, IntPanel):
        qs = torch.zeros(n_out, panel.row_bytes(n_in), dtype=torch.uint8, device=device)
        return WeightPart(panel, n_in, n_out, qs)
    n_unit = n_in // panel.unit
    widths = [n_unit * n for n in (panel.qs_bytes, panel.high_bytes, panel.scale_bytes)]
    widths.append(n_in // FACTOR * panel.d_bytes)
    planes = (torch.empty(n_out, n, dtype=torch.uint8, device=device) if n else None for n in widths)
    first, *others = planes
    assert first is not None
    return WeightPart(panel, n_in, n_out, first, *others)


@dataclass(frozen=True, eq=False)
class GpuWeight:
    """A matrix: one part for each run of rows of one tensor type. Or the matrices of some heads."""

    n_in: int
    parts: tuple[WeightPart, ...]
    heads: Array | None = None  # f32[n_head, n_out, n_in]; parts is empty

    @property
    def n_out(self) -> int:
        return self.heads.shape[1] if self.heads is not None else sum(part.n_out for part in self.parts)

    @property
    def n_part(self) -> int:
        """The parts, which are multiplied one after the other."""
        return len(self.parts)

    @property
    def reads_int8(self) -> bool:
        """Whether few tokens are multiplied as int8, in some part at least."""
        return any(part.is_int for part in self.parts)

    @property
    def reads_halves(self) -> bool:
        """Whether many tokens are multiplied as f16, in some part at least."""
        return any(part.panel.scales != "F32" for part in self.parts)


@dataclass(frozen=True, eq=False)
class GpuExperts:
    """The experts of a layer."""

    n_expert: int
    gate_up: WeightPart  # rows [n_expert, 2, n_ff]: for each expert its gates, then its `up`s; without gates 1, not 2
    down: WeightPart  # rows [n_expert, n_embd]
    bias_gate_up: Array | None  # f32[n_expert, 2 * n_ff], or n_ff
    bias_down: Array | None  # f32[n_expert, n_embd]
    factors: Array | None = None  # f32[n_expert], of the experts' results

    @property
    def reads_int8(self) -> bool:
        """Whether few tokens are multiplied as int8; if not, as f16, as many tokens are."""
        return self.gate_up.is_int and self.down.is_int


class GpuSquares:
    """models.handles.SquaresHandle: of the rows that a matrix reads, or of those that each of n_expert reads."""

    def __init__(self, n_expert: int, width: int, device: torch.device) -> None:
        self.sums = torch.zeros(n_expert, width, dtype=torch.float64, device=device)
        self.n_row = torch.zeros(n_expert, dtype=torch.int64, device=device)

    def take(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        taken = self.sums.cpu().numpy().copy(), self.n_row.cpu().numpy().copy()
        self.sums.zero_()
        self.n_row.zero_()
        return taken

    def keep(self, n_rows: int) -> NoReturn:
        raise UnsupportedError("--full needs all layers on the CPU: give --gpu-layers 0")
