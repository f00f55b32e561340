"""A mixture of experts on a tape: its kernels, and the memory between them."""

from typing import Any

from gguf_run.kernels_cpu.int8_forms import CpuVector
from gguf_run.kernels_cpu.matmul import moe, moe_route
from gguf_run.kernels_cpu.matmul.moe import CpuExperts
from gguf_run.kernels_cpu.panels.panels import BLOCK, IntPanel, panel_id, x_stride
from gguf_run.kernels_cpu.rows.observe import CpuSquares
from gguf_run.kernels_cpu.rows.scale import clear
from gguf_run.kernels_cpu.tape import Tape
from gguf_run.models.rare_ops import Moe
from gguf_run.models.routing import GATINGS


def lower_moe(tape: Tape, op: Moe[CpuExperts, CpuVector, CpuSquares]) -> None:
    """Append three kernels of a mixture: route, gate_up, down.

    route chooses experts, gate_up makes a row for each pair of a token and an expert, and down adds these rows to those
    of the tokens. Rows of pairs are f32, int8 or both, as down and the sums of squares read them.
    """
    gate, up, down, n_expert = op.experts.gate, op.experts.up, op.experts.down, op.experts.n_expert
    mixture = op.mixture
    n_pairs, width = tape.n_batch * mixture.n_used, -(-down.n_in // BLOCK) * BLOCK
    is_int = isinstance(down.panel, IntPanel)
    rows = tape.shared_rows("pairs", n_pairs, 4 * width) if op.squares or not is_int else None
    rows_int8 = tape.shared_rows("int8 pairs", n_pairs, x_stride(width)) if is_int else None
    tape.need(scratch=max(moe.GATE_UP_SCRATCH, moe.PLACES + tape.rows(op.out).stride))
    common: dict[str, Any] = {
        "n_expert": n_expert,
        "n_used": mixture.n_used,
        "plan": tape.shared("plan", 8 * moe_route.plan_words(n_expert, n_pairs)),
        "weights": tape.shared("weights of pairs", 8 * n_pairs + 4 * n_expert),
    }
    route = {"norm": mixture.norm, "scale": mixture.scale, "gating": GATINGS.index(mixture.gating)}
    groups = {"n_group": mixture.n_group, "n_group_used": mixture.n_group_used, "n_group_best": mixture.n_group_best}
    tape.record(op, moe_route.route, bias=op.bias, factors=op.experts.factors, **route, **groups, **common)
    if not op.accumulate:
        tape.record(op, clear, n=op.out.width)
    tape.record(
        op,
        moe.gate_up(panel_id(gate.panel), mixture.activation, 2 if up else 1, mixture.weighs_input),
        to_up=tape.address(up.data) - tape.address(gate.data) if up else 0,
        x=tape.form(op.x, gate.panel),
        out=rows,
        q8=rows_int8,
        bias_up=up.bias if up else None,
        **common,
        **gate.fields(),
    )
    tape.record(op, moe.down(panel_id(down.panel)), x=rows_int8 or rows, **common, **down.fields())
    for squares, x, by_pair in zip(op.squares or (), (op.x, rows), (0, 1), strict=False):
        tape.record(op, moe_route.observe_experts, x=x, by_pair=by_pair, **squares.fields(), **common)
