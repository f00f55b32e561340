"""Launches of a mixture of experts."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor as Array

from gguf_run.kernels_gpu.buffers import Halves, Int8, Launch, Memory, PairMemory, Strided
from gguf_run.kernels_gpu.device.device import registers
from gguf_run.kernels_gpu.device.tuning import FEW, WIDTH
from gguf_run.kernels_gpu.fuse import BLOCK, FusedMoe
from gguf_run.kernels_gpu.matmul import moe, moe_route
from gguf_run.kernels_gpu.matmul.launch import units_at_once
from gguf_run.kernels_gpu.panels.memory import GpuExperts, GpuSquares, WeightPart
from gguf_run.models.rare_ops import Moe
from gguf_run.models.routing import MIN_SUM, NEAR

_TILES = 16, 64  # pairs of a tile: the first where an expert has no more pairs on average


@dataclass(frozen=True, eq=False)
class _Mixture:
    """models.rare_ops.Moe, bound to memory."""

    op: Moe[GpuExperts, Array, GpuSquares]
    memory: Memory
    pairs: PairMemory
    logits: Strided
    out: Strided

    @property
    def n_ff(self) -> int:
        return self.op.experts.down.n_in

    @property
    def n_part(self) -> int:
        """Rows of gate_up for a column of its result: 1 without a gate."""
        return self.op.experts.gate_up.n_out // (self.op.experts.n_expert * self.n_ff)

    @property
    def weights(self) -> tuple[Array | None, Array | None]:
        """Weights of the pairs that gate_up takes, and those that down takes."""
        weights = self.pairs.weights
        return (weights, None) if self.op.mixture.weighs_input else (None, weights)

    def route(self, n: int) -> None:
        """Choose and weight the experts of n tokens; clear what their results are added to."""
        mixture, n_used, n_expert = self.op.mixture, self.op.mixture.n_used, self.op.experts.n_expert
        positions = None if self.op.x.outputs else self.memory.step.positions  # -1: the row only fills up
        moe_route.route[(n,)](
            *self.logits, self.op.bias, self.op.experts.factors, positions, n_expert, mixture.scale, self.pairs.chosen,
            self.pairs.weights, mixture.gating, mixture.norm, mixture.n_group, mixture.n_group_used,
            mixture.n_group_best, NEAR, MIN_SUM, n_used, triton.next_power_of_2(n_used),
            triton.next_power_of_2(n_expert),
        )  # fmt: skip
        if not self.op.accumulate:
            self.memory.rows(self.op.out)[:n].zero_()

    def few(self, n: int, x: Int8, counts: Array) -> None:
        """Multiply few tokens as int8. counts: zeros."""
        experts, pairs, n_used = self.op.experts, self.pairs, self.op.mixture.n_used
        gate_up, down = experts.gate_up, experts.down
        n_row, (weights_in, weights) = max(2, self.memory.tuning.n_row(1)), self.weights
        units, columns = units_at_once(gate_up.n_unit), n_row // self.n_part
        moe.expert_gate_up[(n * n_used, -(-self.n_ff // columns))](
            gate_up.w, x, pairs.chosen, weights_in, experts.bias_gate_up, pairs.made, pairs.int8, counts, self.n_ff,
            PANEL=gate_up.panel, N_UNIT=gate_up.n_unit, N_USED=n_used, PAIRS=columns, UNITS=units, N_PART=self.n_part,
            ACTIVATION=self.op.mixture.activation, num_warps=units // 32,
        )  # fmt: skip
        units = units_at_once(n_used * down.n_unit)
        n_embd = self.op.out.width
        moe.expert_down[(-(-n_embd // n_row), n)](
            down.w, pairs.int8, pairs.chosen, weights, experts.bias_down, *self.out, n_embd,
            PANEL=down.panel, N_UNIT=down.n_unit, N_USED=n_used, R=n_row, UNITS=units, num_warps=units // 32,
            **registers(128),
        )  # fmt: skip

    def many(self, n: int, x: Halves) -> None:
        """Multiply tokens as f16: tiles of the pairs of each expert."""
        experts, pairs, n_used = self.op.experts, self.pairs, self.op.mixture.n_used
        n_pairs, n_ff, n_embd = n * n_used, self.n_ff, self.op.out.width
        weights_in, weights = self.weights
        moe_route.group[(experts.n_expert,)](pairs.chosen, n_pairs, pairs.counts, pairs.order, WIDTH)
        self._tiles(n_pairs, experts.gate_up, x.xh, n_used, self.memory.eights(x, n))
        made = torch.empty(n_pairs, n_ff, device=pairs.raw.device) if self.op.squares else None
        wide = triton.next_power_of_2(n_ff)
        moe.gate_pairs[(n_pairs,)](
            pairs.raw, pairs.raw.stride(0), x.xm, pairs.chosen, weights_in, experts.bias_gate_up, n_ff, made,
            pairs.halves, n_used, self.n_part, self.op.mixture.activation, wide, num_warps=8 if wide > 4096 else 4,
        )  # fmt: skip
        self._tiles(n_pairs, experts.down, pairs.halves.xh, 1, 0)
        moe.add_pairs[(n, -(-n_embd // WIDTH))](
            pairs.raw, pairs.raw.stride(0), pairs.halves.xm, pairs.chosen, weights, experts.bias_down, *self.out,
            n_embd, n_used, WIDTH,
        )  # fmt: skip
        if self.op.squares and made is not None:
            self._observe(self.memory.rows(self.op.x), n_used, self.op.squares[0])
            self._observe(made, 1, self.op.squares[1])

    def _tiles(self, n_pairs: int, part: WeightPart, xh: Array, per_row: int, eights: int) -> None:
        """raw = each pair's row of xh times its expert's rows of part. per_row: pairs that share a row of xh."""
        n_expert, pairs = self.op.experts.n_expert, self.pairs
        n_out, (n_row, units) = part.n_out // n_expert, self.memory.tuning.tile
        m = _TILES[n_pairs > _TILES[0] * n_expert]
        moe.expert_tile[(-(-n_out // n_row), n_pairs // m + min(n_pairs, n_expert))](
            part.w, xh, pairs.counts, pairs.order, pairs.raw, pairs.raw.stride(0), n_expert, n_out, part.n_in,
            part.n_unit, PANEL=part.panel, PER_ROW=per_row, EXPERTS=triton.next_power_of_2(n_expert), M=m, N=n_row,
            UNITS=units, EIGHTS=eights, num_warps=4,
        )  # fmt: skip

    def _observe(self, rows: Array, per_row: int, squares: GpuSquares) -> None:
        """Add the squares of the rows that each expert reads. per_row: pairs that share a row."""
        n_expert, width = squares.sums.shape
        moe_route.observe_experts[(n_expert, -(-width // WIDTH))](
            rows, rows.stride(0), self.pairs.counts, self.pairs.order, squares.sums, squares.n_row, n_expert, width,
            per_row, triton.next_power_of_2(n_expert), WIDTH,
        )  # fmt: skip


def bind_moe(fused: FusedMoe, memory: Memory) -> Launch:
    """Return a function that launches a mixture for so many rows."""
    op = fused.op
    pairs = memory.pairs(op.x, op.experts, op.mixture)
    mixture = _Mixture(op, memory, pairs, memory.strided(op.logits), memory.strided(op.out))
    if fused.form == "int8":
        memory.want(counts=FEW * op.mixture.n_used * -(-mixture.n_ff // BLOCK))
        int8 = memory.int8(op.x)

        def few(n: int) -> None:
            mixture.route(n)
            mixture.few(n, int8, memory.scratch["counts"])

        return few
    halves = memory.halves(op.x)

    def many(n: int) -> None:
        mixture.route(n)
        mixture.many(n, halves)

    return many
