"""Recording a mixture of experts: its three ops, and the memory between them."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.kernels_cpu.matmul import moe, moe_route
from gguf_run.kernels_cpu.matmul.moe import CpuExperts
from gguf_run.kernels_cpu.panels.memory import CpuBuffer, aligned
from gguf_run.kernels_cpu.panels.panels import BLOCK, IntPanel, panel_id
from gguf_run.kernels_cpu.rows.observe import CpuSquares

if TYPE_CHECKING:
    from gguf_run.kernels_cpu.recorder import CpuRecorder


@dataclass(frozen=True)
class MoeMemory:
    """Plan, weights, and rows of the pairs, in f32 and in int8: mixtures of one size use them by turns."""

    held: dict[tuple[int, ...], NDArray[np.uint8]] = field(default_factory=dict)

    def take(self, *key: int) -> int:
        """Address of the memory for a key, whose last number is its size in bytes."""
        if key not in self.held:
            self.held[key] = aligned(key[-1])
        return self.held[key].ctypes.data


def record_moe(
    rec: "CpuRecorder",
    x: CpuBuffer,
    logits: CpuBuffer,
    experts: CpuExperts,
    shape: Any,
    out: CpuBuffer,
    *,
    observed: bool,
) -> tuple[CpuSquares, CpuSquares] | None:
    """models.backend.Recorder.moe."""
    gate, up, down, n_expert = experts.gate, experts.up, experts.down, experts.n_expert
    n_pairs, width = rec.n_batch * shape.n_used, -(-down.n_in // BLOCK) * BLOCK
    is_int = isinstance(down.panel, IntPanel)
    rec.keep.append(experts)
    rec.need(scratch=max(moe.GATE_UP_SCRATCH, moe.PLACES + out.stride))
    common = {"rows": x.rows, "n_expert": n_expert, "n_used": shape.n_used}
    common["plan"] = rec.moe_memory.take(0, 8 * moe_route.plan_words(n_expert, n_pairs))
    common["weights"] = rec.moe_memory.take(1, 8 * n_pairs)
    f32 = rec.moe_memory.take(2, 4 * width * n_pairs) if observed or not is_int else 0
    q8 = rec.moe_memory.take(3, 2 * width * n_pairs) if is_int else 0
    scores = {"logits": logits.address, "logits_stride": logits.stride}
    rec.record(moe_route.route, norm=shape.norm, scale=shape.scale, **scores, **common)
    rows, x_stride = rec.rows_of(x, gate.panel)
    rec.record(
        moe.gate_up(panel_id(gate.panel), shape.activation),
        to_up=up.data.ctypes.data - gate.data.ctypes.data,
        x=rows,
        x_stride=x_stride,
        out=f32,
        out_stride=4 * width,
        q8=q8,
        q8_stride=2 * width,
        bias_up=up.bias_at,
        **common,
        **gate.fields(),
    )
    rec.record(
        moe.down(panel_id(down.panel)),
        x=q8 or f32,
        x_stride=2 * width if is_int else 4 * width,
        out=out.address,
        out_stride=out.stride,
        **common,
        **down.fields(),
    )
    rec.written(out)
    if not observed:
        return None
    squares = CpuSquares(gate.n_in, n_expert), CpuSquares(down.n_in, n_expert)
    rec.keep += squares
    rec.record(moe_route.observe_experts, x=x.address, x_stride=x.stride, by_pair=0, **squares[0].fields(), **common)
    rec.record(moe_route.observe_experts, x=f32, x_stride=4 * width, by_pair=1, **squares[1].fields(), **common)
    return squares
