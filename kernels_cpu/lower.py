"""From a list of ops (models/ops.py) to kernels on a tape: LOWER has a function for each op. See lower_rare.py."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from gguf_run.kernels_cpu.attention import sizes as tiles
from gguf_run.kernels_cpu.attention.append import append
from gguf_run.kernels_cpu.attention.attention import attend, merge
from gguf_run.kernels_cpu.attention.cache import CpuCache
from gguf_run.kernels_cpu.attention.cache_rows import filled, scratch_bytes
from gguf_run.kernels_cpu.attention.cache_types import format_id
from gguf_run.kernels_cpu.int8_forms import CpuOp, CpuVector, Quantize, with_int8
from gguf_run.kernels_cpu.matmul.gated import SCRATCH_BYTES, matmul_gated
from gguf_run.kernels_cpu.matmul.matmul import ONE_HEAD, matmul
from gguf_run.kernels_cpu.panels.memory import CpuTable, CpuWeight, WeightPart
from gguf_run.kernels_cpu.panels.panels import BLOCK, ROWS, TOKENS, panel_id, panel_sizes
from gguf_run.kernels_cpu.rows.embed import copy_rows, embed
from gguf_run.kernels_cpu.rows.norms import rms_norm
from gguf_run.kernels_cpu.rows.rope import angles, rope
from gguf_run.kernels_cpu.tape import Rows, Tape
from gguf_run.models import ops
from gguf_run.models.operands import Buffer

Lowered: TypeAlias = Callable[[Tape, Any, Rows | None], None]  # the last: where an op stores its result as int8 too


def lower(tape: Tape, step: Sequence[CpuOp]) -> int:
    """Append a list of ops to a tape. Returns the number of kernels on it."""
    for op, int8 in with_int8(step):
        (LOWER.get(type(op)) or _rare(type(op)))(tape, op, tape.int8(int8) if int8 else None)
    return len(tape.kernels)


def _rare(kind: type) -> Lowered:
    from gguf_run.kernels_cpu.lower_rare import LOWER_RARE  # late: most models have no such op

    return LOWER_RARE[kind]


def _rms_norm(tape: Tape, op: ops.RmsNorm[CpuVector], int8: Rows | None) -> None:
    tape.record(op, rms_norm, n=op.x.width // op.n_group, q8=int8)


def _embed(tape: Tape, op: ops.Embed[CpuTable], int8: Rows | None) -> None:
    table, row_bytes = op.table, op.table.blocks.shape[1]
    sizes = {"n": table.n_in, "row_bytes": row_bytes, "n_grid": table.grid.size}
    tape.record(op, embed(table.type_name), table=table.blocks, grid=table.grid, **sizes)


def _input(tape: Tape, op: Any, part: WeightPart) -> Buffer | Rows:
    """Return what a part of a matrix is multiplied with."""
    if part.rounding is None:
        return tape.form(op.x, part.panel)
    from gguf_run.kernels_cpu.rows.rounding import rounded  # late: it is only for comparisons

    kind, columns, scale = part.rounding
    rows = tape.shared_rows("rounded", tape.n_batch + TOKENS, 4 * -(-op.x.width // ROWS) * ROWS)
    tape.record(op, rounded(kind), n=op.x.width, columns=columns or op.x.width, out=rows, scale=scale)
    return rows


def _matmul(tape: Tape, op: ops.Matmul[CpuWeight, CpuVector], int8: Rows | None) -> None:
    for part in op.weight.parts:
        columns = part.first, part.n_out
        tape.record(
            op,
            matmul(panel_id(part.panel)),
            w=part.data,
            n_out=part.n_out,
            **panel_sizes(part.panel, op.weight.n_in),
            x=_input(tape, op, part),
            out=op.out.columns(*columns),
            residual=op.residual.columns(*columns) if op.residual else tape.zeros,
            residual_group=4 * ROWS if op.residual else 0,
            bias=op.bias[part.first :] if op.bias is not None else None,
            **ONE_HEAD,
        )


def _matmul_gated(tape: Tape, op: ops.MatmulGated[CpuWeight, CpuVector], int8: Rows | None) -> None:
    n_ff, part = op.weight.n_out // 2, op.weight.parts[0]
    if op.bias is not None or len(op.weight.parts) > 1 or n_ff % BLOCK:
        wide = Buffer.whole(f"gate and up, {2 * n_ff}, {op.x.outputs}", 2 * n_ff, outputs=op.x.outputs)
        _matmul(tape, ops.Matmul(op.x, op.weight, wide, op.bias), None)
        _gated(tape, ops.Gated(wide.columns(0, n_ff), wide.columns(n_ff, n_ff), op.out, op.activation), int8)
        return
    tape.need(scratch=SCRATCH_BYTES)
    sizes, x = panel_sizes(part.panel, op.weight.n_in), _input(tape, op, part)
    kernel = matmul_gated(panel_id(part.panel), op.activation)
    tape.record(op, kernel, w=part.data, n_out=n_ff, **sizes, x=x, q8=int8, zeros=tape.zeros)


def _rope(tape: Tape, op: ops.Rope, int8: Rows | None) -> None:
    rotation, n_half, key = op.rotation, op.rotation.n_rot // 2, (op.rotation, op.x.outputs)
    table = tape.angles.get(key)
    if table is None:
        table = tape.angles[key] = np.zeros((tape.n_batch, n_half, 2), np.float32)
        inv_freq = np.ascontiguousarray(rotation.inv_freqs, np.float64)
        tape.record(op, angles, n_half=n_half, inv_freq=inv_freq, table=table, scale=rotation.scale)
    n_head, neox = -(-op.x.width // op.head_dim), rotation.style == "neox"
    tape.record(op, rope, n_head=n_head, n_half=n_half, neox=neox, table=table)


def _attend(tape: Tape, op: ops.Attend[CpuCache, CpuVector], int8: Rows | None) -> None:
    """Three kernels: append stores k and v if there are any, attend reads in parts, merge joins the parts of a row."""
    shape, k, v = op.shape, op.cache.rows_k, op.cache.rows_v
    n_rep, n_wide = shape.n_head // shape.n_head_kv, filled(shape.head_dim)
    wide = v.wide if v else shape.n_latent
    part_bytes = 4 * tiles.part_floats(wide, n_rep)
    tape.need(parts=part_bytes * tiles.max_parts(tape.n_threads))
    floats = tiles.scratch_floats(n_wide, wide, n_rep, tiles.TILE * tiles.P_BYTES if v else tiles.LATENT_BYTES)
    tape.need(scratch=max(4 * floats, scratch_bytes(shape.head_dim)))
    forms = format_id(k.name), format_id(v.name) if v else -1
    sizes = {**vars(shape), **k.fields("k"), **(v or k).fields("v"), "n_value": shape.n_value}
    kernels = [attend(*forms), merge] if op.k is None else [append(*forms), attend(*forms), merge]
    known = {name for kernel in kernels for name in kernel.fields.names or ()}
    tape.record(
        op,
        *kernels,
        **{name: value for name, value in sizes.items() if name in known},
        n_wide=n_wide,
        wide=wide,
        pages=op.cache.table.pages,
        pages_stride=op.cache.table.pages.shape[1],
        n_pages=op.cache.table.n_pages,
        cache_k=op.cache.k,
        cache_v=op.cache.v,
        part_bytes=part_bytes,
        max_rows=tiles.max_rows(n_rep),
        q8=int8,
    )


def _quantize(tape: Tape, op: Quantize, int8: Rows | None) -> None:
    from gguf_run.kernels_cpu.rows.quantize import quantize

    tape.record(op, quantize, n=op.x.width, q8=tape.int8(op.x))


def _gated(tape: Tape, op: ops.Gated, int8: Rows | None) -> None:
    from gguf_run.kernels_cpu.rows.activation import gated

    up = op.up or Rows(tape.address(np.ones(op.gate.width, np.float32)), 0)
    tape.record(op, gated(op.activation), n=op.gate.width, up=up, q8=int8)


def _outputs(tape: Tape, op: ops.Outputs, int8: Rows | None) -> None:
    tape.record(op, copy_rows, index=tape.table.rows, n=op.x.width)


LOWER: Mapping[type, Lowered] = {
    Quantize: _quantize,
    ops.Embed: _embed,
    ops.RmsNorm: _rms_norm,
    ops.Matmul: _matmul,
    ops.MatmulGated: _matmul_gated,
    ops.Rope: _rope,
    ops.Attend: _attend,
    ops.Gated: _gated,
    ops.Outputs: _outputs,
}
