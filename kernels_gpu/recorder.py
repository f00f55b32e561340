"""Records a decoder's ops for the GPU: a list of launches that a step replays, for any number of tokens.

All memory that launches use is made here and stays where it is, and what changes from step to step (ids, positions,
result rows) is read from device memory: so the launches for one number of rows can be captured as a graph.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor as Array

from gguf_run.kernels_gpu.attention.cache import GpuCache
from gguf_run.kernels_gpu.attention.launch import AttentionOp
from gguf_run.kernels_gpu.matmul.launch import FEW, SCRATCH, After, Norm, Product, Scratch, Tuning, result_width
from gguf_run.kernels_gpu.matmul.moe_launch import GpuExperts, GpuExpertSquares, MoeOp, PairMemory
from gguf_run.kernels_gpu.panels.memory import GpuBuffer, GpuWeight, WeightPart, padded
from gguf_run.kernels_gpu.panels.panels import IntPanel, Panel
from gguf_run.kernels_gpu.program import GpuProgram, Launches, StepInput
from gguf_run.kernels_gpu.rows import embed as rows
from gguf_run.kernels_gpu.rows import rope as rotary
from gguf_run.kernels_gpu.rows.activations import Forms, Halves, Int8, power_of_2
from gguf_run.kernels_gpu.rows.layer_norm import layer_norm
from gguf_run.kernels_gpu.rows.quantize import BLOCK
from gguf_run.kernels_gpu.rows.rms_norm import rms_norm

_WIDTH = 1024  # columns of a program


class GpuSquares:
    """models.backend.Squares."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sums = torch.zeros(width, dtype=torch.float64, device=device)
        self.n_row = 0

    def take(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        taken = self.sums.cpu().numpy()[None].copy(), np.array([self.n_row])
        self.sums.zero_()
        self.n_row = 0
        return taken


class GpuRecorder:
    """models.backend.Recorder: each call appends a function that launches its kernels for so many rows."""

    def __init__(self, device: torch.device, tuning: Tuning, n_batch: int, n_outputs: int) -> None:
        self.device, self.tuning, self.n_batch, self.n_outputs = device, tuning, n_batch, n_outputs
        self.step = StepInput(n_batch, n_outputs, device)
        self._ops: list[Callable[[int], None]] = []
        self._cuts = [0]  # where parts begin
        self._n_before: int | None = None  # ops before the choice of result rows
        self._known: dict[int, dict[tuple[int, int], Forms]] = {}
        self._int8: dict[tuple[int, int, int], Int8] = {}
        self._halves: dict[tuple[int, int, int], Halves] = {}
        self._angles: dict[int, tuple[Any, Array]] = {}
        self._pairs: dict[tuple[int, ...], PairMemory] = {}
        self._wide: dict[tuple[bool, int], GpuBuffer] = {}
        self._n_raw = self._n_scratch = 0
        self._head_norms: list[tuple[Callable[[int], None], GpuBuffer, Array, float, int]] = []
        self._last_rope: tuple[Callable[[int], None], GpuBuffer, Any] | None = None
        self._last_product: tuple[Callable[[int], None], GpuBuffer, After] | None = None
        self._counts: list[Array] = []
        self._observes = False
        self._n_sums = self._widest_head = self._n_counts = 0
        self._sums: list[Array] = []
        self._scratch: list[Scratch] = []

    def _written(self, out: GpuBuffer, by_producer: tuple[str, ...] = ()) -> Forms:
        """Columns of out's memory have new contents, of which no other form is made yet."""
        forms = Forms(by_producer)
        self._known[id(out.memory)] = {(out.start, out.width): forms}
        return forms

    def _want(self, x: GpuBuffer, panel: Panel) -> Forms:
        """Have x's present contents in the forms that a panel is multiplied with: made by the op that made them, if it
        can, else by one of its own; once."""
        forms = self._known.setdefault(id(x.memory), {}).setdefault((x.start, x.width), Forms())
        key = id(x.memory), x.start, x.width
        if isinstance(panel, IntPanel) and forms.int8 is None:
            int8 = self._int8.setdefault(key, Int8.empty(FEW, x.width, self.device))
            forms.int8 = int8
            if "int8" not in forms.by_producer:
                self._ops.append(lambda n: int8.fill(x, n) if n <= FEW else None)
        if panel.constants["SCALES"] != "F32" and forms.halves is None:
            halves = self._halves.setdefault(key, Halves.empty(len(x.memory), x.width, self.device))
            forms.halves = halves
            if "halves" not in forms.by_producer:
                self._ops.append(lambda n: halves.fill(x, n) if n > FEW else None)
        return forms

    # the ops of models.backend.Recorder
    def buffer(self, width: int) -> GpuBuffer:
        after = self._n_before is not None
        n_row = padded(self.n_outputs if after else self.n_batch)
        return GpuBuffer(torch.zeros(n_row, -(-width // 4) * 4, device=self.device), after, 0, width)

    def embed(self, table: WeightPart, out: GpuBuffer, scale: float = 1.0) -> None:
        units = min(_WIDTH // table.panel.unit, power_of_2(table.n_unit))

        def launch(n: int) -> None:
            rows.embed[(n, -(-table.n_unit // units))](
                table.qs, table.high, table.scale, table.d, self.step.ids, out.data, out.stride, table.n_in,
                table.n_unit, scale, **table.panel.constants, UNITS=units,
            )  # fmt: skip

        self._ops.append(launch)
        self._written(out)

    def rms_norm(
        self,
        x: GpuBuffer,
        weight: Array,
        out: GpuBuffer,
        eps: float,
        *,
        n_group: int = 1,
        residual: GpuBuffer | None = None,
    ) -> None:
        n = x.width // n_group
        forms = self._written(out, ("int8", "halves") if n_group == 1 else ())

        last = self._last_product
        after = last[2] if last and last[0] is self._ops[-1] and last[1] is x and n_group == 1 else None
        with_product = after is not None and (not after.norms or (len(after.norms) < 2 and residual is None))

        def launch(n_row: int) -> None:
            few = n_row <= FEW
            if few and with_product:
                return
            q8, halves = forms.int8 if few else None, None if few else forms.halves
            rms_norm[(n_row, n_group)](
                x.data, x.stride, weight, n, eps, out.data, out.stride,
                residual.data if residual else None, residual.stride if residual else 0,
                q8.xq if q8 else None, q8.xd if q8 else None, q8.xs if q8 else None,
                halves.xh if halves else None, halves.xm if halves else None, max(32, power_of_2(n)),
            )  # fmt: skip

        self._ops.append(launch)
        if after is not None and with_product:
            if after.norms:
                after.forms.by_producer = ("halves",)
            after.forms = forms
            after.norms.append(Norm(weight, out, eps, residual))
            self._last_product = launch, out, after
        if x is out and residual is None:
            self._head_norms = [*self._head_norms[-1:], (launch, x, weight, eps, n_group)]

    def layer_norm(
        self, x: GpuBuffer, weight: Array, bias: Array | None, out: GpuBuffer, eps: float, *, n_group: int = 1
    ) -> None:
        n = x.width // n_group
        self._ops.append(
            lambda n_row: layer_norm[(n_row, n_group)](
                x.data, x.stride, weight, bias, n, eps, out.data, out.stride, power_of_2(n)
            )
        )
        self._written(out)

    def matmul(
        self, x: GpuBuffer, weight: GpuWeight, out: GpuBuffer, *, bias: Any = None, residual: Any = None
    ) -> None:
        first = 0
        for part in weight.parts:
            after = After(Forms(), self._counts) if isinstance(part.panel, IntPanel) else None
            self._multiply(Product(part, first, x, out, bias, residual, None, self.tuning), after)
            first += part.n_out
        self._written(out)
        if len(weight.parts) == 1 and after is not None:
            self._last_product = self._ops[-1], out, after

    def matmul_gated(
        self, x: GpuBuffer, weight: GpuWeight, out: GpuBuffer, activation: str, *, bias: Any = None
    ) -> None:
        if len(weight.parts) == 1 and isinstance(weight.parts[0].panel, IntPanel):
            product = Product(weight.parts[0], 0, x, out, bias, None, activation, self.tuning)
            after = After(Forms(), self._counts)
            self._multiply(product, after)
            after.forms = self._written(out, ("int8",) if out.width % BLOCK == 0 else ())
            return
        key, n_ff = (out.after, weight.n_out), weight.n_out // 2
        wide = self._wide[key] = self._wide.get(key) or self.buffer(weight.n_out)
        self.matmul(x, weight, wide, bias=bias)
        self.gated(wide.columns(0, n_ff), wide.columns(n_ff, n_ff), out, activation)

    def _multiply(self, product: Product, after: After | None = None) -> None:
        part, forms = product.part, self._want(product.x, product.part.panel)
        self._n_raw = max(self._n_raw, len(product.x.memory) * result_width(part.n_out))
        self._n_counts = max(self._n_counts, -(-product.n_out // BLOCK))
        self._n_scratch = max(self._n_scratch, min(SCRATCH, part.n_out * part.n_in))

        def launch(n: int) -> None:
            if n <= FEW:
                product.few(n, forms.int8, after)
            else:
                product.many(n, forms.halves, self._scratch[0])

        self._ops.append(launch)

    def rope(self, x: GpuBuffer, rope: Any, head_dim: int) -> None:
        n_half = rope.n_rot // 2
        width = power_of_2(n_half)
        if id(rope) not in self._angles:
            table = torch.zeros(len(x.memory), n_half, 2, device=self.device)
            self._angles[id(rope)] = rope, table
            inv_freq = torch.tensor(np.asarray(rope.inv_freq, np.float64), device=self.device)
            self._n_before = None if self._n_before is None else self._n_before + 1
            self._ops.insert(  # first, so that it does not stand between ops that belong together
                0, lambda n: rotary.angles[(n,)](self.step.positions, inv_freq, table, n_half, rope.scale, width)
            )
        n_head, table = x.width // head_dim, self._angles[id(rope)][1]

        def launch(n: int) -> None:
            rotary.rope[(n,)](
                x.data, x.stride, table, n_head, head_dim, n_half, rope.style == "neox", power_of_2(n_head), width
            )

        self._ops.append(launch)
        self._last_rope = launch, x, rope
        self._written(x)

    def attention(
        self,
        q: GpuBuffer,
        k: GpuBuffer,
        v: GpuBuffer,
        cache: GpuCache,
        shape: Any,
        out: GpuBuffer,
        *,
        sinks: Array | None = None,
    ) -> None:
        rope, angles = self._take_rope(q, k)
        norms = self._take_norms((q, shape.n_head), (k, shape.n_head_kv))
        self._written(q)
        forms = self._written(out, ("int8",) if shape.head_dim == cache.k.width else ())
        op = AttentionOp(q, k, v, cache, shape, out, sinks, rope, angles, norms, self.tuning.programs)
        self._n_sums, self._widest_head = max(self._n_sums, op.n_sums), max(self._widest_head, shape.head_dim)
        self._ops.append(lambda n: op.launch(n, self.step, self._sums, forms.int8 if n <= FEW else None))

    def _take_rope(self, q: GpuBuffer, k: GpuBuffer) -> tuple[Any, Array | None]:
        """The rope op that was recorded last, if q and k are what it turns: attention does that too. And its table."""
        last = self._last_rope
        if last is None or last[0] is not self._ops[-1]:
            return None, None
        _, x, rope = last
        if q.memory is not k.memory or x.memory is not q.memory or (q.start, k.start) != (x.start, q.start + q.width):
            return None, None
        if x.width != q.width + k.width:
            return None, None
        self._ops.pop()
        return rope, self._angles[id(rope)][1]

    def _take_norms(self, *sides: tuple[GpuBuffer, int]) -> tuple[Array, Array, float] | None:
        """The norms of q's and k's heads, if they are the ops that were recorded last: attention does those too."""
        if [norm[0] for norm in self._head_norms] != self._ops[-2:] or len(self._head_norms) < 2:
            return None
        (_, q, q_weight, eps, q_groups), (_, k, k_weight, k_eps, k_groups) = self._head_norms
        if eps != k_eps or any(
            (x.memory is not side.memory, x.start, x.width, n) != (False, side.start, side.width, n_head)
            for (x, n), (side, n_head) in zip(((q, q_groups), (k, k_groups)), sides, strict=True)
        ):
            return None
        del self._ops[-2:]
        return q_weight, k_weight, eps

    def gated(self, gate: GpuBuffer, up: GpuBuffer | None, out: GpuBuffer, activation: str) -> None:
        n, others = gate.width, (up.data, up.stride) if up else (None, 0)
        self._ops.append(
            lambda n_row: rows.gated[(n_row, -(-n // _WIDTH))](
                gate.data, gate.stride, *others, out.data, out.stride, n, activation, _WIDTH
            )
        )
        self._written(out)

    def gate_rows(self, x: GpuBuffer, gate: GpuBuffer) -> None:
        n = x.width
        self._ops.append(
            lambda n_row: rows.gate_rows[(n_row, -(-n // _WIDTH))](x.data, x.stride, gate.data, gate.stride, n, _WIDTH)
        )
        self._written(x)

    def softcap(self, x: GpuBuffer, scale: float, cap: float) -> None:
        n = x.width
        self._ops.append(
            lambda n_row: rows.softcap[(n_row, -(-n // _WIDTH))](x.data, x.stride, n, scale, cap or None, _WIDTH)
        )
        self._written(x)

    def moe(
        self, x: GpuBuffer, logits: GpuBuffer, experts: GpuExperts, shape: Any, out: GpuBuffer, *, observe: bool = False
    ) -> tuple[GpuExpertSquares, GpuExpertSquares] | None:
        n_expert, n_ff, n_embd = experts.n_expert, experts.down.n_in, x.width
        forms, key = self._want(x, experts.x_panel), (len(x.memory), shape.n_used, n_expert, n_ff, n_embd)
        memory = self._pairs[key] = self._pairs.get(key) or PairMemory.empty(*key, self.device)
        widths = (n_embd, n_ff) if observe else ()
        squares = tuple(GpuExpertSquares(n_expert, width, self.device) for width in widths)
        positions = None if x.after else self.step.positions
        op = MoeOp(x, logits, experts, shape, out, forms, memory, self.tuning, positions, squares)
        self._n_counts = max(self._n_counts, op.n_counts)
        self._ops.append(lambda n: op.launch(n, self._counts[0]))
        self._written(out)
        return (squares[0], squares[1]) if observe else None

    def observe(self, x: GpuBuffer) -> GpuSquares:
        self._observes = True  # each step counts rows on the host
        squares, step, n = GpuSquares(x.width, self.device), self.step, x.width

        def launch(_: int) -> None:
            n_row = step.n_out if x.after else step.n_tokens
            rows.observe[(-(-n // _WIDTH),)](x.data, x.stride, squares.sums, n_row, n, _WIDTH)
            squares.n_row += n_row

        self._ops.append(launch)
        return squares

    def cut(self) -> None:
        self._cuts.append(len(self._ops))
        self._known.clear()
        self._last_rope = self._last_product = None

    def outputs(self, x: GpuBuffer) -> GpuBuffer:
        self._n_before = len(self._ops)
        out, n = self.buffer(x.width), x.width
        self._ops.append(
            lambda n_row: rows.copy_rows[(n_row, -(-n // _WIDTH))](
                x.data, x.stride, self.step.rows, out.data, out.stride, n, _WIDTH
            )
        )
        self._written(out)
        return out

    def finish(self, result: GpuBuffer) -> GpuProgram:
        raw = torch.zeros(self._n_raw, device=self.device)
        self._scratch.append(Scratch(torch.zeros(self._n_scratch, dtype=torch.float16, device=self.device), raw))
        self._counts.append(torch.zeros(self._n_counts, dtype=torch.int32, device=self.device))
        self._sums += (
            torch.zeros(self._n_sums, self._widest_head, device=self.device),
            torch.zeros(self._n_sums, 2, device=self.device),
        )
        n_before = len(self._ops) if self._n_before is None else self._n_before
        bounds = itertools.pairwise([*self._cuts, n_before, len(self._ops)])
        *parts, after = (Launches(self._ops[first:end], self.device, not self._observes) for first, end in bounds)
        return GpuProgram(self.step, parts, after, result, self.n_batch, self.n_outputs)
