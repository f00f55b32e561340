"""A layer's experts on the GPU, and the launches of its mixture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor as Array

from gguf_run.kernels_gpu.device.device import registers
from gguf_run.kernels_gpu.matmul import moe, moe_route
from gguf_run.kernels_gpu.matmul.launch import FEW, Tuning, units_at_once
from gguf_run.kernels_gpu.panels.memory import GpuBuffer, WeightPart
from gguf_run.kernels_gpu.panels.panels import PANELS, IntPanel, Panel
from gguf_run.kernels_gpu.rows.activations import Forms, Halves, Int8, power_of_2
from gguf_run.kernels_gpu.rows.quantize import BLOCK

_WIDTH = 1024
_TILES = 16, 64  # pairs of a tile: the first where an expert has no more of them on average


@dataclass(frozen=True, eq=False)
class GpuExperts:
    """gate_up: for each expert its gates and then its `up`s, [n_expert, 2, n_ff] rows; down: [n_expert, n_embd] rows;
    biases of the same shapes, f32, or None."""

    n_expert: int
    gate_up: WeightPart
    down: WeightPart
    bias_gate_up: Array | None
    bias_down: Array | None

    @property
    def is_int(self) -> bool:
        """Whether a few tokens are multiplied as int8; else all are as f16."""
        return isinstance(self.gate_up.panel, IntPanel) and isinstance(self.down.panel, IntPanel)

    @property
    def x_panel(self) -> Panel:
        """A panel that wants of x what these want."""
        return self.gate_up.panel if self.is_int else PANELS["F16"]


class GpuExpertSquares:
    """models.backend.Squares."""

    def __init__(self, n_expert: int, width: int, device: torch.device) -> None:
        self.sums = torch.zeros(n_expert, width, dtype=torch.float64, device=device)
        self.n_row = torch.zeros(n_expert, dtype=torch.int64, device=device)

    def take(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        taken = self.sums.cpu().numpy().copy(), self.n_row.cpu().numpy().copy()
        self.sums.zero_()
        self.n_row.zero_()
        return taken


@dataclass(frozen=True)
class PairMemory:
    """What the mixtures of all layers use, one after the other, for n_pairs pairs of tokens and experts. made, int8: of
    a few tokens."""

    chosen: Array
    weights: Array
    counts: Array
    order: Array
    made: Array
    int8: Int8
    raw: Array
    halves: Halves

    @classmethod
    def empty(
        cls, n_row: int, n_used: int, n_expert: int, n_ff: int, n_embd: int, device: torch.device
    ) -> "PairMemory":
        n_pairs, n_few = n_row * n_used, FEW * n_used

        def whole(n: int) -> Array:
            return torch.zeros(n, dtype=torch.int32, device=device)

        return cls(
            whole(n_pairs),
            torch.zeros(n_pairs, device=device),
            whole(n_expert),
            whole(n_pairs),
            torch.zeros(n_few, n_ff, device=device),
            Int8.empty(n_few, n_ff, device),
            torch.zeros(n_pairs, max(2 * n_ff, n_embd), device=device),
            Halves.empty(n_pairs, n_ff, device),
        )


@dataclass(frozen=True, eq=False)
class MoeOp:
    """models.backend.Recorder.moe. shape: models.backend.Moe. positions: None if all rows are tokens. squares: of x's
    rows and of what down reads, or none."""

    x: GpuBuffer
    logits: GpuBuffer
    experts: GpuExperts
    shape: Any
    out: GpuBuffer
    forms: Forms
    memory: PairMemory
    tuning: Tuning
    positions: Array | None
    squares: Sequence[GpuExpertSquares] = ()

    @property
    def n_ff(self) -> int:
        return self.experts.down.n_in

    @property
    def n_counts(self) -> int:
        """Blocks of int8 that several programs make together."""
        return FEW * self.shape.n_used * -(-self.n_ff // BLOCK)

    def launch(self, n: int, counts: Array) -> None:
        """counts: n_counts zeros."""
        n_used, memory, n_expert = self.shape.n_used, self.memory, self.experts.n_expert
        moe_route.route[(n,)](
            self.logits.data, self.logits.stride, self.positions, n_expert, self.shape.scale, memory.chosen,
            memory.weights, self.shape.norm, n_used, power_of_2(n_used), power_of_2(n_expert),
        )  # fmt: skip
        if n <= FEW and self.experts.is_int and not self.squares:
            self._few(n, counts)
        else:
            self._many(n)

    def _few(self, n: int, counts: Array) -> None:
        experts, memory, n_used, x = self.experts, self.memory, self.shape.n_used, self.forms.int8
        assert x is not None
        gate_up, down, q8 = experts.gate_up, experts.down, memory.int8
        n_row = max(2, dict(self.tuning.rows)[1])
        units = units_at_once(gate_up.n_unit)
        moe.expert_gate_up[(n * n_used, -(-self.n_ff // (n_row // 2)))](
            gate_up.qs, gate_up.high, gate_up.scale, gate_up.d, x.xq, x.xd, x.xs, memory.chosen, experts.bias_gate_up,
            memory.made, q8.xq, q8.xd, q8.xs, counts, self.n_ff, **gate_up.panel.constants, N_UNIT=gate_up.n_unit,
            N_USED=n_used, PAIRS=n_row // 2, UNITS=units, ACTIVATION=self.shape.activation, num_warps=units // 32,
        )  # fmt: skip
        units = units_at_once(n_used * down.n_unit)
        moe.expert_down[(-(-self.out.width // n_row), n)](
            down.qs, down.high, down.scale, down.d, q8.xq, q8.xd, q8.xs, memory.chosen, memory.weights,
            experts.bias_down, self.out.data, self.out.stride, self.out.width, **down.panel.constants,
            N_UNIT=down.n_unit, N_USED=n_used, R=n_row, UNITS=units, num_warps=units // 32, **registers(128),
        )  # fmt: skip

    def _many(self, n: int) -> None:
        experts, memory, n_used, x = self.experts, self.memory, self.shape.n_used, self.forms.halves
        n_pairs, n_expert, n_ff, n_embd = n * n_used, experts.n_expert, self.n_ff, self.out.width
        assert x is not None
        if n <= FEW:  # whoever makes x makes halves of more tokens only
            x.fill(self.x, n)
        moe_route.group[(n_expert,)](memory.chosen, n_pairs, memory.counts, memory.order, _WIDTH)
        self._tiles(n_pairs, experts.gate_up, x.xh, n_used)
        made = torch.empty(n_pairs, n_ff, device=memory.raw.device) if self.squares else None
        wide = power_of_2(n_ff)
        moe.gate_pairs[(n_pairs,)](
            memory.raw, memory.raw.stride(0), x.xm, memory.chosen, experts.bias_gate_up, n_ff, made, memory.halves.xh,
            memory.halves.xm, n_used, self.shape.activation, wide, num_warps=8 if wide > 4096 else 4,
        )  # fmt: skip
        self._tiles(n_pairs, experts.down, memory.halves.xh, 1)
        moe.add_pairs[(n, -(-n_embd // _WIDTH))](
            memory.raw, memory.raw.stride(0), memory.halves.xm, memory.chosen, memory.weights, experts.bias_down,
            self.out.data, self.out.stride, n_embd, n_used, _WIDTH,
        )  # fmt: skip
        if made is not None:
            rows = (self.x.data, self.x.stride, n_used), (made, n_ff, 1)
            for (read, stride, per_row), seen in zip(rows, self.squares, strict=True):
                width = seen.sums.shape[1]
                moe_route.observe_experts[(n_expert, -(-width // _WIDTH))](
                    read, stride, memory.counts, memory.order, seen.sums, seen.n_row, n_expert, width, per_row,
                    power_of_2(n_expert), _WIDTH,
                )  # fmt: skip

    def _tiles(self, n_pairs: int, part: WeightPart, xh: Array, per_row: int) -> None:
        """raw = each pair's row of xh times its expert's rows of part."""
        n_expert, raw, memory = self.experts.n_expert, self.memory.raw, self.memory
        n_out, (n_row, units) = part.n_out // n_expert, self.tuning.tile
        m = _TILES[n_pairs > _TILES[0] * n_expert]
        grid = -(-n_out // n_row), n_pairs // m + min(n_pairs, n_expert)
        moe.expert_tile[grid](
            part.qs, part.high, part.scale, part.d, xh, memory.counts, memory.order, raw, raw.stride(0), n_expert,
            n_out, part.n_in, part.n_unit, **part.panel.constants, PER_ROW=per_row, EXPERTS=power_of_2(n_expert), M=m,
            N=n_row, UNITS=units, num_warps=4,
        )  # fmt: skip
