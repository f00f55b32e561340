"""From the fused ops of a step (fuse.py) to launches of kernels: a table from the class of an op to a function.

Each function binds an op to memory and returns another function, which launches the op's kernels for so many rows.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor as Array

from gguf_run.kernels_gpu.attention.launch import bind_attention
from gguf_run.kernels_gpu.buffers import Launch, Memory
from gguf_run.kernels_gpu.device.tuning import WIDTH
from gguf_run.kernels_gpu.fuse import Angles, Convert, FusedAttention, FusedMatmul, FusedMoe, FusedNorm
from gguf_run.kernels_gpu.matmul.launch import bind_matmul
from gguf_run.kernels_gpu.matmul.moe_launch import bind_moe
from gguf_run.kernels_gpu.panels.fields import dequantize
from gguf_run.kernels_gpu.panels.memory import GpuSquares, GpuWeight, WeightPart
from gguf_run.kernels_gpu.recurrent.delta_rule import bind_delta_rule
from gguf_run.kernels_gpu.recurrent.scan import bind_scan
from gguf_run.kernels_gpu.recurrent.short_conv import bind_short_conv
from gguf_run.kernels_gpu.rows import activation, norms, quantize, rope, streams
from gguf_run.models.ops import Embed, Gated, Observe, Outputs, Rope
from gguf_run.models.rare_ops import (
    AddPositions,
    DeltaRule,
    GateRows,
    LayerNorm,
    MatchRms,
    MatmulHeads,
    Mix,
    ScaleAdapters,
    Scan,
    ShortConv,
    Softcap,
    Temper,
    Threshold,
    Xielu,
)


def _embed(op: Embed[WeightPart], memory: Memory) -> Launch:
    table, out, ids = op.table, memory.strided(op.out), memory.step.ids
    units = min(WIDTH // table.panel.unit, triton.next_power_of_2(table.n_unit))
    return lambda n: dequantize[(n, -(-table.n_unit // units))](
        table.w, ids, 0, *out, n, table.n_in, table.n_unit, op.scale, table.panel, N=1, UNITS=units
    )


def _norm(fused: FusedNorm, memory: Memory) -> Launch:
    op, n = fused.op, fused.op.x.width // fused.op.n_group
    x, out, residual = (memory.strided(buffer) for buffer in (op.x, op.out, op.residual))
    int8 = memory.int8(op.out) if "int8" in fused.forms else None
    halves = memory.halves(op.out) if "halves" in fused.forms else None
    width = max(32 if halves is None else 256, triton.next_power_of_2(n))
    return lambda n_row: norms.norm[(n_row, op.n_group)](
        *x, op.weight, None, n, op.eps, *out, *residual, int8, halves, False, op.is_grouped,
        memory.eights(halves, n_row) if halves else 0, width,
    )  # fmt: skip


def _layer_norm(op: LayerNorm[Array], memory: Memory) -> Launch:
    x, out, n = memory.strided(op.x), memory.strided(op.out), op.x.width // op.n_group
    return lambda n_row: norms.norm[(n_row, op.n_group)](
        *x, op.weight, op.bias, n, op.eps, *out, None, 0, None, None, True, True, 0, triton.next_power_of_2(n)
    )


def _convert(op: Convert, memory: Memory) -> Launch:
    x, width = memory.strided(op.x), op.x.width
    if op.form == "int8":
        int8 = memory.int8(op.x)
        return lambda n: quantize.quantize[(n, -(-width // WIDTH))](*x, width, int8, WIDTH)
    halves, wide = memory.halves(op.x), max(256, triton.next_power_of_2(width))
    return lambda n: quantize.halve[(n,)](*x, width, halves, memory.eights(halves, n), wide)


def _angles(op: Angles, memory: Memory) -> Launch:
    rotation, table, tokens = op.rotation, memory.angles(op.rotation, op.outputs), memory.step.of(op.outputs)
    inv_freq = torch.tensor(np.asarray(rotation.inv_freqs, np.float64), device=memory.device)
    n_half = inv_freq.shape[1]
    width = triton.next_power_of_2(n_half)
    return lambda n: rope.angles[(n,)](tokens.positions, tokens.is_long, inv_freq, table, n_half, rotation.scale, width)


def _rope(op: Rope, memory: Memory) -> Launch:
    x, table, n_half = memory.strided(op.x), memory.angles(op.rotation, op.x.outputs), op.rotation.n_rot // 2
    n_head = -(-op.x.width // op.head_dim)
    widths = triton.next_power_of_2(n_head), triton.next_power_of_2(n_half)
    return lambda n: rope.rope[(n,)](*x, table, n_head, op.head_dim, n_half, op.rotation.style == "neox", *widths)


def _matmul_heads(op: MatmulHeads[GpuWeight], memory: Memory) -> Launch:
    """In f32, by torch: the matrices are small."""
    x, out = (memory.rows(buffer).unflatten(1, (op.n_head, -1)) for buffer in (op.x, op.out))
    w, n_in, n_out = op.weight.heads, op.weight.n_in, op.weight.n_out
    assert w is not None

    def launch(n: int) -> None:
        out[:n, :, :n_out] = torch.bmm(x[:n, :, :n_in].transpose(0, 1), w.mT).transpose(0, 1)
        out[:n, :, n_out:] = x[:n, :, n_in:]

    return launch


def _by_columns(kernel: Any, n: int, *arguments: Any) -> Launch:
    """Return a function that launches a kernel whose programs have WIDTH of the n columns of one row each."""
    return lambda n_row: kernel[(n_row, -(-n // WIDTH))](*arguments, WIDTH)


def _gated(op: Gated, memory: Memory) -> Launch:
    gate, up, out = (memory.strided(buffer) for buffer in (op.gate, op.up, op.out))
    return _by_columns(activation.gated, op.gate.width, *gate, *up, *out, op.gate.width, op.activation)


def _xielu(op: Xielu, memory: Memory) -> Launch:
    x, out = memory.strided(op.x), memory.strided(op.out)
    return _by_columns(activation.xielu, op.x.width, *x, *out, op.x.width, op.alpha_p, op.alpha_n, op.beta, op.eps)


def _gate_rows(op: GateRows, memory: Memory) -> Launch:
    return _by_columns(activation.gate_rows, op.x.width, *memory.strided(op.x), *memory.strided(op.gate), op.x.width)


def _scale_adapters(op: ScaleAdapters, memory: Memory) -> Launch:
    adapters, factors = (torch.tensor(column, device=memory.device) for column in zip(*op.columns, strict=True))
    n = op.x.width
    x, seqs, values = memory.strided(op.x), memory.step.of(op.x.outputs).seqs, memory.step.scales(op.scales)
    return _by_columns(activation.scale_adapters, n, *x, seqs, values, values.shape[1], adapters, factors, n)


def _temper(op: Temper, memory: Memory) -> Launch:
    numbers = op.temperature.scale, op.temperature.length, op.temperature.offset
    x, positions = memory.strided(op.x), memory.step.of(op.x.outputs).positions
    return _by_columns(activation.temper, op.x.width, *x, positions, op.x.width, *numbers)


def _add_positions(op: AddPositions[Array], memory: Memory) -> Launch:
    x, positions, n = memory.strided(op.x), memory.step.of(op.x.outputs).positions, op.x.width
    return _by_columns(activation.add_positions, n, *x, positions, op.table, n, op.n_row)


def _softcap(op: Softcap, memory: Memory) -> Launch:
    return _by_columns(activation.softcap, op.x.width, *memory.strided(op.x), op.x.width, op.scale, op.cap or None)


def _mix(op: Mix, memory: Memory) -> Launch:
    buffers = (op.base, op.x, op.minus, op.coef, op.out)
    strided = [value for buffer in buffers for value in memory.strided(buffer)]
    n, n_out = op.width, op.out.width // op.width
    return lambda n_row: streams.mix[(n_row, -(-n // WIDTH), n_out)](*strided, n, op.shift, op.x.width // n, WIDTH)


def _match_rms(op: MatchRms, memory: Memory) -> Launch:
    x, like, n = memory.strided(op.x), memory.strided(op.like), op.like.width
    width = triton.next_power_of_2(n)
    return lambda n_row: streams.match_rms[(n_row, op.x.width // n)](*x, *like, n, op.least, width)


def _threshold(op: Threshold, memory: Memory) -> Launch:
    x, n = memory.strided(op.x), op.x.width
    return lambda n_row: streams.threshold[(n_row,)](*x, n, op.factor, triton.next_power_of_2(n))


def _observe(op: Observe[GpuSquares], memory: Memory) -> Launch:
    x, step, squares, n = memory.strided(op.x), memory.step, op.squares, op.x.width
    return lambda _: activation.observe[(-(-n // WIDTH),)](
        *x, squares.sums, squares.n_row, step.n_out if op.x.outputs else step.n_tokens, n, WIDTH
    )


def _outputs(op: Outputs, memory: Memory) -> Launch:
    x, out = memory.strided(op.x), memory.strided(op.out)
    return _by_columns(activation.copy_rows, op.x.width, *x, memory.step.rows, *out, op.x.width)


_BIND: dict[type, Callable[[Any, Memory], Launch]] = {
    Angles: _angles,
    FusedAttention: bind_attention,
    Convert: _convert,
    DeltaRule: bind_delta_rule,
    Embed: _embed,
    Gated: _gated,
    GateRows: _gate_rows,
    LayerNorm: _layer_norm,
    FusedMoe: bind_moe,
    FusedNorm: _norm,
    Mix: _mix,
    MatchRms: _match_rms,
    Threshold: _threshold,
    Observe: _observe,
    Outputs: _outputs,
    FusedMatmul: bind_matmul,
    MatmulHeads: _matmul_heads,
    Rope: _rope,
    Scan: bind_scan,
    ShortConv: bind_short_conv,
    ScaleAdapters: _scale_adapters,
    Softcap: _softcap,
    Xielu: _xielu,
    Temper: _temper,
    AddPositions: _add_positions,
}


def bind(ops: Iterable[Any], memory: Memory) -> list[Launch]:
    """Return the launches of fused ops, in their order."""
    return [_BIND[type(op)](op, memory) for op in ops]
