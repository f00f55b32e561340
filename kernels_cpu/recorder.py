"""The ops of models.backend.Recorder, bound to addresses."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.kernels_cpu.attention.append import append
from gguf_run.kernels_cpu.attention.attention import attend
from gguf_run.kernels_cpu.attention.cache import CpuCache
from gguf_run.kernels_cpu.attention.cache_rows import filled, scratch_bytes
from gguf_run.kernels_cpu.attention.cache_types import format_id
from gguf_run.kernels_cpu.attention.merge import merge
from gguf_run.kernels_cpu.attention.plan import max_parts, max_rows, part_floats, scratch_floats
from gguf_run.kernels_cpu.matmul.gated import SCRATCH_BYTES, matmul_gated
from gguf_run.kernels_cpu.matmul.matmul import matmul
from gguf_run.kernels_cpu.matmul.moe import CpuExperts
from gguf_run.kernels_cpu.matmul.moe_record import MoeMemory, record_moe
from gguf_run.kernels_cpu.panels.memory import LANES, CpuBuffer, CpuTable, CpuWeight, aligned
from gguf_run.kernels_cpu.panels.panels import BLOCK, ROWS, TOKENS, panel_id
from gguf_run.kernels_cpu.replay.op import TapeOp
from gguf_run.kernels_cpu.replay.tape import Tape
from gguf_run.kernels_cpu.replay.team import Team
from gguf_run.kernels_cpu.rows.activation import gated
from gguf_run.kernels_cpu.rows.embed import embed
from gguf_run.kernels_cpu.rows.norms import layer_norm, rms_norm
from gguf_run.kernels_cpu.rows.observe import CpuSquares, observe
from gguf_run.kernels_cpu.rows.rope import angles, rope
from gguf_run.kernels_cpu.rows.scale import gate_rows, softcap


class CpuRecorder(Tape):
    """models.backend.Recorder: each call binds an op to addresses and appends it to the tape."""

    def __init__(
        self, team: Team, n_batch: int, n_outputs: int, compile_ops: Callable[[Iterable[TapeOp]], None]
    ) -> None:
        super().__init__(team, n_batch, n_outputs, compile_ops)
        self.need(scratch=4 * TOKENS * ROWS)
        self._zeros = aligned(4 * LANES)
        self._angles: dict[int, NDArray[np.float32]] = {}
        self._wide: dict[tuple[bool, int], CpuBuffer] = {}
        self._ones: dict[int, NDArray[np.float32]] = {}
        self.moe_memory = MoeMemory()
        self.keep += [self._zeros, self._ones, self.moe_memory]

    def embed(self, table: CpuTable, out: CpuBuffer, scale: float = 1.0) -> None:
        self.keep.append(table)
        self.record(
            embed(table.type_name),
            rows=out.rows,
            ids=self.table.ids.ctypes.data,
            table=table.blocks.ctypes.data,
            row_bytes=table.blocks.shape[1],
            n=table.n_in,
            out=out.address,
            out_stride=out.stride,
            grid=table.grid.ctypes.data,
            n_grid=table.grid.size,
            scale=scale,
        )
        self.written(out)

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
        self.keep.append(weight)
        arguments = self.record(
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
        self.written(out, arguments if n_group == 1 else None)

    def matmul(
        self,
        x: CpuBuffer,
        weight: CpuWeight,
        out: CpuBuffer,
        *,
        bias: NDArray[np.float32] | None = None,
        residual: CpuBuffer | None = None,
    ) -> None:
        self.keep += [weight, bias]
        for part in weight.parts:
            panel = part.panel
            rows, x_stride = self.rows_of(x, panel)
            self.record(
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
        self.written(out)

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
            key = self.is_after, weight.n_out
            if key not in self._wide:
                self._wide[key] = self.buffer(weight.n_out)
            wide = self._wide[key]
            self.matmul(x, weight, wide, bias=bias)
            self.gated(wide.columns(0, n_ff), wide.columns(n_ff, n_ff), out, activation)
            return
        self.keep.append(weight)
        self.need(scratch=SCRATCH_BYTES)
        panel = parts[0].panel
        rows, x_stride = self.rows_of(x, panel)
        arguments = self.record(
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
        self.written(out, arguments)

    def rope(self, x: CpuBuffer, rope_: Any, head_dim: int) -> None:
        n_half = rope_.n_rot // 2
        if id(rope_) not in self._angles:
            table = self._angles[id(rope_)] = np.zeros((self.n_batch, n_half, 2), np.float32)
            inv_freq = np.ascontiguousarray(rope_.inv_freq, np.float64)
            self.keep += [rope_, inv_freq, table]
            self.record(
                angles,
                rows=x.rows,
                positions=self.table.positions.ctypes.data,
                n_half=n_half,
                inv_freq=inv_freq.ctypes.data,
                table=table.ctypes.data,
                scale=rope_.scale,
            )
        self.record(
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
        self.written(x)

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
        self.need(parts=part_bytes * max_parts(self.n_threads))
        self.need(scratch=max(4 * scratch_floats(n_wide, v_rows.wide, n_rep), scratch_bytes(head_dim)))
        k_static, v_static = k_rows.static, v_rows.static
        self.keep += [cache, k_static, v_static, sinks]
        forms = format_id(k_rows.name), format_id(v_rows.name)
        step = {"runs": self.table.runs.ctypes.data, "n_head_kv": shape.n_head_kv, "head_dim": head_dim}
        tokens = {"rows": q.rows, "run_of": self.table.run_of.ctypes.data}
        store = {"n_wide": n_wide, "n_ctx": cache.n_ctx, "v_rotate": v_rows.rotates, "k_rotate": k_rows.rotates}
        store |= {"cache_k": cache.k.ctypes.data, "k_group": k_rows.group_bytes}
        store |= {"cache_v": cache.v.ctypes.data, "v_group": v_rows.group_bytes}
        result = {
            "n_head": shape.n_head,
            "wide": v_rows.wide,
            "sinks": sinks.ctypes.data if sinks is not None else 0,
            "out": out.address,
            "out_stride": out.stride,
            "part_bytes": part_bytes,
            "max_rows": max_rows(n_rep),
        }
        self.record(
            append(*forms),
            positions=self.table.positions.ctypes.data,
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
        self.record(
            attend(*forms),
            n_runs=self.table.n_runs,
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
        merge_ = self.record(merge, v_rotate=v_rows.rotates, q8=0, q8_stride=0, **tokens, **step, **result)
        self.written(out, merge_)

    def gated(self, gate: CpuBuffer, up: CpuBuffer | None, out: CpuBuffer, activation: str) -> None:
        if up is None and gate.width not in self._ones:
            self._ones[gate.width] = np.ones(gate.width, np.float32)
        arguments = self.record(
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
        self.written(out, arguments)

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
        self.keep += [weight, bias]
        arguments = self.record(
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
        self.written(out, arguments if n_group == 1 else None)

    def gate_rows(self, x: CpuBuffer, gate: CpuBuffer) -> None:
        to = {"x": x.address, "x_stride": x.stride, "gate": gate.address, "gate_stride": gate.stride}
        self.record(gate_rows, rows=x.rows, n=x.width, **to)
        self.written(x)

    def softcap(self, x: CpuBuffer, scale: float, cap: float) -> None:
        self.record(softcap, rows=x.rows, n=x.width, x=x.address, x_stride=x.stride, scale=scale, cap=cap)
        self.written(x)

    def moe(
        self, x: CpuBuffer, logits: CpuBuffer, experts: CpuExperts, shape: Any, out: CpuBuffer, *, observe: bool = False
    ) -> tuple[CpuSquares, CpuSquares] | None:
        return record_moe(self, x, logits, experts, shape, out, observed=observe)

    def observe(self, x: CpuBuffer) -> CpuSquares:
        squares = CpuSquares(x.width)
        self.keep.append(squares)
        self.record(observe, rows=x.rows, x=x.address, x_stride=x.stride, **squares.fields())
        return squares
