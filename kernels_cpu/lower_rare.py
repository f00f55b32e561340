"""More of lower.py: LOWER_RARE has the ops that few models have. The larger kernels are imported in the functions."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from gguf_run.kernels_cpu.int8_forms import CpuVector
from gguf_run.kernels_cpu.panels.memory import CpuWeight
from gguf_run.kernels_cpu.replay.op import TapeOp
from gguf_run.kernels_cpu.rows.activation import xielu
from gguf_run.kernels_cpu.rows.layer_norm import layer_norm
from gguf_run.kernels_cpu.rows.observe import observe
from gguf_run.kernels_cpu.rows.scale import add_positions, gate_rows, scale_adapters, softcap, temper
from gguf_run.kernels_cpu.rows.streams import match_rms, mix, threshold
from gguf_run.kernels_cpu.tape import Rows, Tape
from gguf_run.models import ops, rare_ops

if TYPE_CHECKING:
    from gguf_run.kernels_cpu.recurrent.state import CpuState

Lowered: TypeAlias = Callable[[Tape, Any, Rows | None], None]  # as in lower.py


def _on_rows(kernel: TapeOp, sizes: Callable[[Any], dict[str, Any]] = lambda op: {"n": op.x.width}) -> Lowered:
    """Return the function for an op that is one kernel. sizes: values of its fields that are no fields of the op."""
    makes_int8 = "q8" in (kernel.fields.names or ())

    def lower_op(tape: Tape, op: Any, int8: Rows | None) -> None:
        tape.record(op, kernel, **sizes(op), **({"q8": int8} if makes_int8 else {}))

    return lower_op


def _short_conv(tape: Tape, op: "rare_ops.ShortConv[CpuState, CpuVector]", int8: Rows | None) -> None:
    from gguf_run.kernels_cpu.recurrent.short_conv import short_conv

    n, none = op.x.width, np.zeros(op.x.width, np.float32)
    tape.record(
        op,
        short_conv(op.n_taps, op.activation == "silu"),
        n=n,
        taps=np.ascontiguousarray(op.taps.reshape(n, op.n_taps).T),
        bias=none if op.bias is None else op.bias,
        state=op.state.data,
        zeros=none,
    )


def _delta_rule(tape: Tape, op: "rare_ops.DeltaRule[CpuState, CpuVector]", int8: Rows | None) -> None:
    from gguf_run.kernels_cpu.recurrent.delta_rule import delta_rule, scratch_bytes

    d_k, d_v = op.q.width // op.n_head_k, op.v.width // op.n_head_v
    tape.need(scratch=scratch_bytes(tape.n_batch, d_v))
    tape.record(op, delta_rule, d_k=d_k, d_v=d_v, state=op.state.data)


def _scan(tape: Tape, op: "rare_ops.Scan[CpuState, CpuVector]", int8: Rows | None) -> None:
    """Two kernels: scan_steps computes numbers of each token and head, scan moves the state along."""
    from gguf_run.kernels_cpu.recurrent.scan import scan, scan_steps

    tape.record(
        op,
        scan_steps,
        scan,
        steps=tape.shared("steps", 8 * tape.n_batch * op.n_head),
        head_dim=op.x.width // op.n_head,
        n_state=op.b.width // op.n_group,
        state=op.state.data,
        slot_bytes=op.state.data.strides[0],
    )


def _scale_adapters(tape: Tape, op: rare_ops.ScaleAdapters, int8: Rows | None) -> None:
    adapters, factors = zip(*op.columns, strict=True)
    columns = {"adapters": np.array(adapters), "factors": np.array(factors, np.float32)}
    values = op.scales.values
    tape.record(op, scale_adapters, n=op.x.width, n_adapter=values.shape[1], values=values, **columns)


def _moe(tape: Tape, op: Any, int8: Rows | None) -> None:
    from gguf_run.kernels_cpu.lower_moe import lower_moe

    lower_moe(tape, op)


def _matmul_heads(tape: Tape, op: rare_ops.MatmulHeads[CpuWeight], int8: Rows | None) -> None:
    from gguf_run.kernels_cpu.lower_heads import lower_heads

    lower_heads(tape, op)


LOWER_RARE: Mapping[type, Lowered] = {
    rare_ops.LayerNorm: _on_rows(layer_norm, lambda op: {"n": op.x.width // op.n_group}),
    rare_ops.Xielu: _on_rows(xielu),
    rare_ops.Softcap: _on_rows(softcap),
    ops.Observe: _on_rows(observe, lambda op: op.squares.fields()),
    rare_ops.MatmulHeads: _matmul_heads,
    rare_ops.Temper: _on_rows(temper, lambda op: {"n": op.x.width, **vars(op.temperature)}),
    rare_ops.AddPositions: _on_rows(add_positions),
    rare_ops.ShortConv: _short_conv,
    rare_ops.DeltaRule: _delta_rule,
    rare_ops.Scan: _scan,
    rare_ops.Moe: _moe,
    rare_ops.GateRows: _on_rows(gate_rows),
    rare_ops.ScaleAdapters: _scale_adapters,
    rare_ops.Mix: _on_rows(
        mix, lambda op: {"n": op.width, "n_x": op.x.width // op.width, "n_out": op.out.width // op.width}
    ),
    rare_ops.MatchRms: _on_rows(match_rms, lambda op: {"n": op.like.width, "n_part": op.x.width // op.like.width}),
    rare_ops.Threshold: _on_rows(threshold),
}
