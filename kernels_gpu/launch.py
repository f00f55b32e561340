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
from gguf_run.kernels_gpu.panels.memory import GpuSquares, WeightPart
from gguf_run.kernels_gpu.rows import embed as rows
from gguf_run.kernels_gpu.rows import quantize, rope
from gguf_run.kernels_gpu.rows.layer_norm import layer_norm
from gguf_run.kernels_gpu.rows.rms_norm import rms_norm
from gguf_run.models.ops import Embed, Gated, GateRows, LayerNorm, Observe, Outputs, Rope, Softcap


def _embed(op: Embed[WeightPart], memory: Memory) -> Launch:
    table, out, ids = op.table, memory.rows(op.out), memory.step.ids
    units = min(WIDTH // table.panel.unit, triton.next_power_of_2(table.n_unit))
    return lambda n: rows.embed[(n, -(-table.n_unit // units))](
        table.w, ids, out, out.stride(0), table.n_in, table.n_unit, op.scale, PANEL=table.panel, UNITS=units
    )


def _norm(norm: FusedNorm, memory: Memory) -> Launch:
    op, x, out = norm.op, memory.rows(norm.op.x), memory.rows(norm.op.out)
    n, residual = op.x.width // op.n_group, None if op.residual is None else memory.rows(op.residual)
    residual_stride = 0 if residual is None else residual.stride(0)
    int8 = memory.int8(op.out) if "int8" in norm.forms else None
    halves = memory.halves(op.out) if "halves" in norm.forms else None
    return lambda n_row: rms_norm[(n_row, op.n_group)](
        x, x.stride(0), op.weight, n, op.eps, out, out.stride(0), residual, residual_stride, int8, halves,
        max(32, triton.next_power_of_2(n)),
    )  # fmt: skip


def _layer_norm(op: LayerNorm[Array], memory: Memory) -> Launch:
    x, out, n = memory.rows(op.x), memory.rows(op.out), op.x.width // op.n_group
    return lambda n_row: layer_norm[(n_row, op.n_group)](
        x, x.stride(0), op.weight, op.bias, n, op.eps, out, out.stride(0), triton.next_power_of_2(n)
    )


def _convert(op: Convert, memory: Memory) -> Launch:
    x, width = memory.rows(op.x), op.x.width
    if op.form == "int8":
        int8 = memory.int8(op.x)
        return lambda n: quantize.quantize[(n, -(-width // WIDTH))](x, x.stride(0), width, int8, WIDTH)
    halves = memory.halves(op.x)
    return lambda n: quantize.halve[(n,)](x, x.stride(0), width, halves, triton.next_power_of_2(width))


def _angles(op: Angles, memory: Memory) -> Launch:
    rotation, table, positions = op.rotation, memory.angles(op.rotation), memory.step.positions
    inv_freq = torch.tensor(np.asarray(rotation.inv_freq, np.float64), device=memory.device)
    n_half = len(inv_freq)
    return lambda n: rope.angles[(n,)](
        positions, inv_freq, table, n_half, rotation.scale, triton.next_power_of_2(n_half)
    )


def _rope(op: Rope, memory: Memory) -> Launch:
    x, table, n_half = memory.rows(op.x), memory.angles(op.rotation), op.rotation.n_rot // 2
    n_head = op.x.width // op.head_dim
    return lambda n: rope.rope[(n,)](
        x, x.stride(0), table, n_head, op.head_dim, n_half, op.rotation.style == "neox",
        triton.next_power_of_2(n_head), triton.next_power_of_2(n_half),
    )  # fmt: skip


def _gated(op: Gated, memory: Memory) -> Launch:
    gate, out, n = memory.rows(op.gate), memory.rows(op.out), op.gate.width
    up = None if op.up is None else memory.rows(op.up)
    up_stride = 0 if up is None else up.stride(0)
    return lambda n_row: rows.gated[(n_row, -(-n // WIDTH))](
        gate, gate.stride(0), up, up_stride, out, out.stride(0), n, op.activation, WIDTH
    )


def _gate_rows(op: GateRows, memory: Memory) -> Launch:
    x, gate, n = memory.rows(op.x), memory.rows(op.gate), op.x.width
    return lambda n_row: rows.gate_rows[(n_row, -(-n // WIDTH))](x, x.stride(0), gate, gate.stride(0), n, WIDTH)


def _softcap(op: Softcap, memory: Memory) -> Launch:
    x, n = memory.rows(op.x), op.x.width
    return lambda n_row: rows.softcap[(n_row, -(-n // WIDTH))](x, x.stride(0), n, op.scale, op.cap or None, WIDTH)


def _observe(op: Observe[GpuSquares], memory: Memory) -> Launch:
    x, step, squares, n = memory.rows(op.x), memory.step, op.squares, op.x.width
    return lambda _: rows.observe[(-(-n // WIDTH),)](
        x, x.stride(0), squares.sums, squares.n_row, step.n_out if op.x.outputs else step.n_tokens, n, WIDTH
    )


def _outputs(op: Outputs, memory: Memory) -> Launch:
    x, out, chosen, n = memory.rows(op.x), memory.rows(op.out), memory.step.rows, op.x.width
    return lambda n_row: rows.copy_rows[(n_row, -(-n // WIDTH))](x, x.stride(0), chosen, out, out.stride(0), n, WIDTH)


_BIND: dict[type, Callable[[Any, Memory], Launch]] = {
    Angles: _angles,
    FusedAttention: bind_attention,
    Convert: _convert,
    Embed: _embed,
    Gated: _gated,
    GateRows: _gate_rows,
    LayerNorm: _layer_norm,
    FusedMoe: bind_moe,
    FusedNorm: _norm,
    Observe: _observe,
    Outputs: _outputs,
    FusedMatmul: bind_matmul,
    Rope: _rope,
    Softcap: _softcap,
}


def bind(ops: Iterable[Any], memory: Memory) -> list[Launch]:
    """Return the launches of fused ops, in their order."""
    return [_BIND[type(op)](op, memory) for op in ops]
