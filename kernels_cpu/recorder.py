"""Recording a step into a tape."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.kernels_cpu.attention import attend
from gguf_run.kernels_cpu.attention_append import append
from gguf_run.kernels_cpu.attention_merge import merge
from gguf_run.kernels_cpu.attention_plan import max_parts, max_rows, part_floats, scratch_floats
from gguf_run.kernels_cpu.cache import CpuCache
from gguf_run.kernels_cpu.cache_rows import filled, scratch_bytes
from gguf_run.kernels_cpu.cache_types import format_id
from gguf_run.kernels_cpu.gated import gated
from gguf_run.kernels_cpu.layer_norm import layer_norm
from gguf_run.kernels_cpu.matmul import TOKENS, matmul
from gguf_run.kernels_cpu.matmul_gated import SCRATCH_BYTES, matmul_gated
from gguf_run.kernels_cpu.memory import LANES, CpuBuffer, CpuTable, CpuWeight, aligned
from gguf_run.kernels_cpu.moe import CpuExperts
from gguf_run.kernels_cpu.moe_record import MoeMemory, record_moe
from gguf_run.kernels_cpu.observe import CpuSquares, observe
from gguf_run.kernels_cpu.op import Op
from gguf_run.kernels_cpu.panels import BLOCK, ROWS, IntPanel, Panel, panel_id
from gguf_run.kernels_cpu.program import CpuProgram
from gguf_run.kernels_cpu.quantize import quantize
from gguf_run.kernels_cpu.rms_norm import rms_norm
from gguf_run.kernels_cpu.rope import angles, rope
from gguf_run.kernels_cpu.rows import copy_rows, embed
from gguf_run.kernels_cpu.runs import RunTable
from gguf_run.kernels_cpu.scale import gate_rows, softcap
from gguf_run.kernels_cpu.team import Team


@dataclass
class _Activations:
    """What is known of a buffer's present contents in the form that integer panels read."""

    producer: NDArray[np.void] | None = None  # the arguments of the op that can quantize what it has just made
    q8: NDArray[np.uint8] | None = None  # the quantized rows, once something wants them


@dataclass
class _Tape:
    ops: list[tuple[Op, NDArray[np.void]]] = field(default_factory=list)
    keep: list[Any] = field(default_factory=list)  # arrays whose addresses are in the arguments


class CpuRecorder:
    """models.backend.Recorder: each call binds an op to addresses and appends it to the tape."""

    def __init__(self, team: Team, n_batch: int, n_outputs: int, compile_ops: Callable[[Iterable[Op]], None]) -> None:
        """compile_ops: called at the end with the ops of the tape."""
        self._team, self._compile = team, compile_ops
        self.n_batch, self.n_outputs = n_batch, n_outputs
        self._tape = _Tape()
        self._table = RunTable(n_batch, n_outputs)
        self._zeros = aligned(4 * LANES)
        self._body = -1
        self._scratch_bytes = 4 * TOKENS * ROWS
        self._scratched: list[NDArray[np.void]] = []
        self._parts_bytes = 0
        self._parted: list[NDArray[np.void]] = []
        self._angles: dict[int, NDArray[np.float32]] = {}
        self._known: dict[int, dict[tuple[int, int], _Activations]] = {}
        self._wide: dict[tuple[bool, int], CpuBuffer] = {}
        self._q8: dict[tuple[int, int], NDArray[np.uint8]] = {}
        self._ones: dict[int, NDArray[np.float32]] = {}
        self._moe = MoeMemory()

    # recording
    def _record(self, op: Op, **values: Any) -> NDArray[np.void]:
        names = op.fields.names or ()
        arguments = op.bind(**values, **{name: 0 for name in ("scratch", "scratch_stride") if name in names})
        if "scratch" in names:
            self._scratched.append(arguments)
        self._tape.ops.append((op, arguments))
        return arguments

    def _written(self, out: CpuBuffer, producer: NDArray[np.void] | None = None) -> None:
        """Columns of out's memory have new contents."""
        known = self._known[id(out.memory)] = {}
        if producer is not None and out.width % 32 == 0:
            known[out.address, out.width] = _Activations(producer)

    def _quantized(self, x: CpuBuffer) -> NDArray[np.uint8]:
        """x's rows as activation blocks: by the op that made x, if it can, else by an op of its own; once."""
        key = (x.address, x.width)
        known = self._known.setdefault(id(x.memory), {}).setdefault(key, _Activations())
        if known.q8 is None:
            if key not in self._q8:
                self._q8[key] = aligned(len(x.memory) * 2 * x.width)
            known.q8 = self._q8[key]
            q8 = {"q8": known.q8.ctypes.data, "q8_stride": 2 * x.width}
            if known.producer is not None:
                for name, value in q8.items():
                    known.producer[name] = value
            else:
                self._record(quantize, rows=x.rows, n=x.width, x=x.address, x_stride=x.stride, **q8)
        return known.q8

    # the ops of models.backend.Recorder
    def buffer(self, width: int) -> CpuBuffer:
        after = self._body >= 0
        n_rows = -(-(self.n_outputs if after else self.n_batch) // TOKENS) * TOKENS
        stride = -(-width // ROWS) * ROWS
        memory = aligned(4 * n_rows * stride).view(np.float32).reshape(n_rows, stride)
        self._tape.keep.append(memory)
        return CpuBuffer(memory, self._table.n_out if after else self._table.n_tokens, 0, width)

    def embed(self, table: CpuTable, out: CpuBuffer, scale: float = 1.0) -> None:
        self._tape.keep.append(table)
        self._record(
            embed(table.type_name),
            rows=out.rows,
            ids=self._table.ids.ctypes.data,
            table=table.blocks.ctypes.data,
            row_bytes=table.blocks.shape[1],
            n=table.n_in,
            out=out.address,
            out_stride=out.stride,
            grid=table.grid.ctypes.data,
            n_grid=table.grid.size,
            scale=scale,
        )
        self._written(out)

    def rms_norm(
        self,
        x: CpuBuffer,
        weight: NDArray[np.float32],
        out: CpuBuffer,
        eps: float,
        *,
        n_group: int = 1,
        residual: CpuBuffer | None = None,
    ) -> None:
        self._tape.keep.append(weight)
        arguments = self._record(
            rms_norm,
            rows=x.rows,
            n_group=n_group,
            n=x.width // n_group,
            x=x.address,
            x_stride=x.stride,
            weight=weight.ctypes.data,
            out=out.address,
            out_stride=out.stride,
            residual=residual.address if residual else 0,
            residual_stride=residual.stride if residual else 0,
            q8=0,
            q8_stride=0,
            eps=eps,
        )
        self._written(out, arguments if n_group == 1 else None)

    def matmul(
        self,
        x: CpuBuffer,
        weight: CpuWeight,
        out: CpuBuffer,
        *,
        bias: NDArray[np.float32] | None = None,
        residual: CpuBuffer | None = None,
    ) -> None:
        self._tape.keep += [weight, bias]
        for part in weight.parts:
            panel = part.panel
            rows, x_stride = self._rows(x, panel)
            self._record(
                matmul(panel_id(panel)),
                rows=x.rows,
                n_out=part.n_out,
                n_steps=weight.n_in // panel.columns,
                step_bytes=panel.step_bytes,
                group_bytes=panel.group_bytes(weight.n_in),
                w=part.data.ctypes.data,
                x=rows,
                x_stride=x_stride,
                out=out.address + 4 * part.first,
                out_stride=out.stride,
                residual=residual.address + 4 * part.first if residual else self._zeros.ctypes.data,
                residual_stride=residual.stride if residual else 0,
                residual_group=4 * ROWS if residual else 0,
                bias=bias.ctypes.data + 4 * part.first if bias is not None else 0,
            )
        self._written(out)

    def matmul_gated(
        self,
        x: CpuBuffer,
        weight: CpuWeight,
        out: CpuBuffer,
        activation: str,
        *,
        bias: NDArray[np.float32] | None = None,
    ) -> None:
        n_ff, parts = weight.n_out // 2, weight.parts
        if bias is not None or len(parts) > 1 or n_ff % BLOCK:
            key = self._body >= 0, weight.n_out
            if key not in self._wide:
                self._wide[key] = self.buffer(weight.n_out)
            wide = self._wide[key]
            self.matmul(x, weight, wide, bias=bias)
            self.gated(wide.columns(0, n_ff), wide.columns(n_ff, n_ff), out, activation)
            return
        self._tape.keep.append(weight)
        self._scratch_bytes = max(self._scratch_bytes, SCRATCH_BYTES)
        panel = parts[0].panel
        rows, x_stride = self._rows(x, panel)
        arguments = self._record(
            matmul_gated(panel_id(panel), activation),
            rows=x.rows,
            n_out=n_ff,
            n_steps=weight.n_in // panel.columns,
            step_bytes=panel.step_bytes,
            group_bytes=panel.group_bytes(weight.n_in),
            w=parts[0].data.ctypes.data,
            x=rows,
            x_stride=x_stride,
            out=out.address,
            out_stride=out.stride,
            q8=0,
            q8_stride=0,
            zeros=self._zeros.ctypes.data,
        )
        self._written(out, arguments)

    def _rows(self, x: CpuBuffer, panel: Panel) -> tuple[int, int]:
        """Address and stride of x's rows in the form that a panel is multiplied with."""
        if isinstance(panel, IntPanel):
            return self._quantized(x).ctypes.data, 2 * x.width
        return x.address, x.stride

    def rope(self, x: CpuBuffer, rope_: Any, head_dim: int) -> None:
        n_half = rope_.n_rot // 2
        if id(rope_) not in self._angles:
            table = self._angles[id(rope_)] = np.zeros((self.n_batch, n_half, 2), np.float32)
            inv_freq = np.ascontiguousarray(rope_.inv_freq, np.float64)
            self._tape.keep += [rope_, inv_freq, table]
            self._record(
                angles,
                rows=x.rows,
                positions=self._table.positions.ctypes.data,
                n_half=n_half,
                inv_freq=inv_freq.ctypes.data,
                table=table.ctypes.data,
                scale=rope_.scale,
            )
        self._record(
            rope,
            rows=x.rows,
            n_head=x.width // head_dim,
            head_dim=head_dim,
            n_half=n_half,
            neox=rope_.style == "neox",
            x=x.address,
            x_stride=x.stride,
            table=self._angles[id(rope_)].ctypes.data,
        )
        self._written(x)

    def attention(
        self,
        q: CpuBuffer,
        k: CpuBuffer,
        v: CpuBuffer,
        cache: CpuCache,
        shape: Any,
        out: CpuBuffer,
        *,
        sinks: NDArray[np.float32] | None = None,
    ) -> None:
        k_rows, v_rows = cache.rows_k, cache.rows_v
        n_rep, head_dim, n_wide = shape.n_head // shape.n_head_kv, shape.head_dim, filled(shape.head_dim)
        part_bytes = 4 * part_floats(v_rows.wide, n_rep)
        self._parts_bytes = max(self._parts_bytes, part_bytes * max_parts(self._team.n_threads))
        needed = 4 * scratch_floats(n_wide, v_rows.wide, n_rep), scratch_bytes(head_dim)
        self._scratch_bytes = max(self._scratch_bytes, *needed)
        k_static, v_static = k_rows.static, v_rows.static
        self._tape.keep += [cache, k_static, v_static, sinks]
        forms = format_id(k_rows.name), format_id(v_rows.name)
        step = {"runs": self._table.runs.ctypes.data, "n_head_kv": shape.n_head_kv, "head_dim": head_dim}
        tokens = {"rows": q.rows, "run_of": self._table.run_of.ctypes.data}
        store = {"n_wide": n_wide, "n_ctx": cache.n_ctx, "v_rotate": v_rows.rotates, "k_rotate": k_rows.rotates}
        store |= {"cache_k": cache.k.ctypes.data, "k_group": k_rows.group_bytes}
        store |= {"cache_v": cache.v.ctypes.data, "v_group": v_rows.group_bytes}
        result = {
            "n_head": shape.n_head,
            "wide": v_rows.wide,
            "sinks": sinks.ctypes.data if sinks is not None else 0,
            "out": out.address,
            "out_stride": out.stride,
            "parts": 0,
            "part_bytes": part_bytes,
            "max_rows": max_rows(n_rep),
        }
        self._record(
            append(*forms),
            positions=self._table.positions.ctypes.data,
            k=k.address,
            k_stride=k.stride,
            k_wide=k_rows.wide,
            k_static=k_static.ctypes.data,
            v=v.address,
            v_stride=v.stride,
            v_wide=v_rows.wide,
            v_static=v_static.ctypes.data,
            **tokens,
            **step,
            **store,
        )
        attend_ = self._record(
            attend(*forms),
            n_runs=self._table.n_runs,
            q=q.address,
            q_stride=q.stride,
            k_at=k_rows.form.elements_at(head_dim, False),
            v_at=v_rows.form.elements_at(head_dim, True),
            window=shape.window,
            scale=shape.scale,
            softcap=shape.softcap,
            **step,
            **store,
            **result,
        )
        merge_ = self._record(merge, v_rotate=v_rows.rotates, q8=0, q8_stride=0, **tokens, **step, **result)
        self._parted += [attend_, merge_]
        self._written(out, merge_)

    def gated(self, gate: CpuBuffer, up: CpuBuffer | None, out: CpuBuffer, activation: str) -> None:
        if up is None and gate.width not in self._ones:
            self._ones[gate.width] = np.ones(gate.width, np.float32)
        arguments = self._record(
            gated(activation),
            rows=gate.rows,
            n=gate.width,
            gate=gate.address,
            gate_stride=gate.stride,
            up=up.address if up else self._ones[gate.width].ctypes.data,
            up_stride=up.stride if up else 0,
            out=out.address,
            out_stride=out.stride,
            q8=0,
            q8_stride=0,
        )
        self._written(out, arguments)

    def layer_norm(
        self,
        x: CpuBuffer,
        weight: NDArray[np.float32],
        bias: NDArray[np.float32] | None,
        out: CpuBuffer,
        eps: float,
        *,
        n_group: int = 1,
    ) -> None:
        self._tape.keep += [weight, bias]
        arguments = self._record(
            layer_norm,
            rows=x.rows,
            n_group=n_group,
            n=x.width // n_group,
            x=x.address,
            x_stride=x.stride,
            weight=weight.ctypes.data,
            bias=bias.ctypes.data if bias is not None else 0,
            out=out.address,
            out_stride=out.stride,
            q8=0,
            q8_stride=0,
            eps=eps,
        )
        self._written(out, arguments if n_group == 1 else None)

    def gate_rows(self, x: CpuBuffer, gate: CpuBuffer) -> None:
        to = {"x": x.address, "x_stride": x.stride, "gate": gate.address, "gate_stride": gate.stride}
        self._record(gate_rows, rows=x.rows, n=x.width, **to)
        self._written(x)

    def softcap(self, x: CpuBuffer, scale: float, cap: float) -> None:
        self._record(softcap, rows=x.rows, n=x.width, x=x.address, x_stride=x.stride, scale=scale, cap=cap)
        self._written(x)

    def moe(
        self, x: CpuBuffer, logits: CpuBuffer, experts: CpuExperts, shape: Any, out: CpuBuffer, *, observe: bool = False
    ) -> tuple[CpuSquares, CpuSquares] | None:
        return record_moe(self, x, logits, experts, shape, out, observed=observe)

    def observe(self, x: CpuBuffer) -> CpuSquares:
        squares = CpuSquares(x.width)
        self._tape.keep.append(squares)
        self._record(observe, rows=x.rows, x=x.address, x_stride=x.stride, **squares.fields())
        return squares

    def outputs(self, x: CpuBuffer) -> CpuBuffer:
        self._body = len(self._tape.ops)
        out = self.buffer(x.width)
        self._record(
            copy_rows,
            rows=out.rows,
            index=self._table.rows.ctypes.data,
            n=x.width,
            x=x.address,
            x_stride=x.stride,
            out=out.address,
            out_stride=out.stride,
        )
        self._written(out)
        return out

    def finish(self, result: CpuBuffer) -> "CpuProgram":
        """Give the ops their shared memory, compile them, and lay out the tape."""
        self._compile(dict.fromkeys(op for op, _ in self._tape.ops))
        n_threads = self._team.n_threads
        stride = -(-self._scratch_bytes // 64) * 64
        scratch, parts = aligned(stride * n_threads), aligned(self._parts_bytes)
        for arguments in self._scratched:
            arguments["scratch"], arguments["scratch_stride"] = scratch.ctypes.data, stride
        for arguments in self._parted:
            arguments["parts"] = parts.ctypes.data
        tape = np.array([(op.compiled.address, arguments.ctypes.data) for op, arguments in self._tape.ops], np.int64)
        keep = [self._tape, self._zeros, self._q8, self._ones, self._moe, scratch, parts]
        return CpuProgram(self._team, tape, self._body, self._table, result, keep)
