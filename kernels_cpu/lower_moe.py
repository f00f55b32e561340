"""A mixture of experts on a tape: its kernels, and the memory between them."""

from typing import Any

from gguf_run.kernels_cpu.matmul import moe, moe_route
from gguf_run.kernels_cpu.matmul.moe import CpuExperts
from gguf_run.kernels_cpu.panels.panels import BLOCK, IntPanel, panel_id
from gguf_run.kernels_cpu.rows.observe import CpuSquares
from gguf_run.kernels_cpu.tape import Tape
from gguf_run.models.ops import Moe


def lower_moe(tape: Tape, op: Moe[CpuExperts, CpuSquares]) -> None:
    """Append three kernels of a mixture: route, gate_up, down.

    route chooses experts, gate_up makes a row for each pair of a token and an expert, and down adds these rows to those
    of the tokens. Rows of pairs are f32, int8 or both, as down and the sums of squares read them.
    """
    gate, up, down, n_expert = op.experts.gate, op.experts.up, op.experts.down, op.experts.n_expert
    n_pairs, width = tape.n_batch * op.mixture.n_used, -(-down.n_in // BLOCK) * BLOCK
    is_int = isinstance(down.panel, IntPanel)
    rows = tape.shared_rows("pairs", n_pairs, 4 * width) if op.squares or not is_int else None
    rows_int8 = tape.shared_rows("int8 pairs", n_pairs, 2 * width) if is_int else None
    tape.need(scratch=max(moe.GATE_UP_SCRATCH, moe.PLACES + tape.rows(op.out).stride))
    common: dict[str, Any] = {
        "n_expert": n_expert,
        "n_used": op.mixture.n_used,
        "plan": tape.shared("plan", 8 * moe_route.plan_words(n_expert, n_pairs)),
        "weights": tape.shared("weights of pairs", 8 * n_pairs),
    }
    tape.record(op, moe_route.route, norm=op.mixture.norm, scale=op.mixture.scale, **common)
    tape.record(
        op,
        moe.gate_up(panel_id(gate.panel), op.mixture.activation),
        to_up=tape.address(up.data) - tape.address(gate.data),
        x=tape.form(op.x, gate.panel),
        out=rows,
        q8=rows_int8,
        bias_up=up.bias,
        **common,
        **gate.fields(),
    )
    tape.record(op, moe.down(panel_id(down.panel)), x=rows_int8 or rows, **common, **down.fields())
    for squares, x, by_pair in zip(op.squares or (), (op.x, rows), (0, 1), strict=False):
        tape.record(op, moe_route.observe_experts, x=x, by_pair=by_pair, **squares.fields(), **common)
