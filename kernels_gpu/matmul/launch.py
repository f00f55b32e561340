"""Launches of matmul: which kernels multiply how many tokens with a matrix."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor as Array

from gguf_run.kernels_gpu.buffers import Halves, Int8, Launch, Memory, Strided
from gguf_run.kernels_gpu.device.tuning import SCRATCH, WIDTH
from gguf_run.kernels_gpu.fuse import BLOCK, FusedMatmul
from gguf_run.kernels_gpu.matmul.decode import matmul_decode, matmul_float
from gguf_run.kernels_gpu.matmul.tiles import finish, matmul_tile
from gguf_run.kernels_gpu.panels.fields import dequantize
from gguf_run.kernels_gpu.panels.memory import WeightPart
from gguf_run.models.operands import Buffer
from gguf_run.models.ops import Matmul, MatmulGated

_Norm = tuple[Array, Array | None, int, float, Array | None, int]  # see matmul_decode


def units_at_once(n_unit: int) -> int:
    """Return the threads for a row of n_unit units: 4, 2 or 1 warps, whichever leaves the fewest threads idle."""
    return min((128, 64, 32), key=lambda units: (-(-n_unit // units) * units, -units))


def result_width(n_out: int) -> int:
    """Return the columns of memory for a result of n_out columns: rows are aligned."""
    return -(-n_out // 16) * 16


@dataclass(frozen=True)
class PartProduct:
    """The product of one part of a matrix, bound to memory."""

    memory: Memory
    part: WeightPart
    x: Array  # f32[rows, n_in]
    out: Strided  # f32[rows, n_out], the columns of this part
    bias: Array | None  # f32[part.n_out]
    residual: Strided  # f32[rows, n_out]
    activation: str | None  # of a gated product, whose result has half as many columns as the part has rows
    int8: Int8 | None  # x as int8
    halves: Halves | None  # x as f16

    @property
    def n_out(self) -> int:
        """Columns of the result."""
        return self.part.n_out // (1 if self.activation is None else 2)

    def few(self, n: int, made: Int8 | None = None, norms: tuple[_Norm, ...] = ()) -> None:
        """Multiply n tokens, a bucket up to FEW. made, norms: see matmul_decode; for integer panels only."""
        part, n_unit = self.part, self.part.n_unit
        n_row, units = self.memory.tuning.n_row(n), units_at_once(n_unit)
        if not part.is_int:
            matmul_float[(-(-part.n_out // n_row),)](
                part.qs, self.x, self.x.stride(0), *self.out, self.bias, *self.residual, part.n_out, part.n_in, n_unit,
                TYPE=part.panel.scales, M=n, R=n_row, UNITS=units, num_warps=units // 32,
            )  # fmt: skip
            return
        if self.activation is not None:
            n_row = max(2, n_row)
        per_program = n_row if self.activation is None else n_row // 2
        matmul_decode[(-(-self.n_out // per_program),)](
            part.w, self.int8, *self.out, self.bias, *self.residual, self.n_out, n_unit, made,
            self.memory.scratch["counts"], norms[0] if norms else None, norms[1][:4] if norms[1:] else None,
            PANEL=part.panel, M=n, R=n_row, UNITS=units, EVEN=n_unit % units == 0, ACTIVATION=self.activation,
            WIDTH=max(32, triton.next_power_of_2(self.n_out)), num_warps=units // 32,
        )  # fmt: skip

    def many(self, n: int) -> None:
        """Multiply n tokens, more than FEW."""
        width, part = result_width(self.part.n_out), self.part
        raw = self.memory.scratch["raw"][: n * width].view(n, width)[:, : part.n_out]
        if self.halves is None:
            torch.mm(self.x[:n], part.qs.view(torch.float32)[:, : part.n_in].T, out=raw)
        elif n <= self.memory.tuning.small:
            self._tiles(n, self.halves, raw)
        else:
            self._in_memory(self.halves.xh[:n], raw)
        factor = None if self.halves is None else self.halves.xm
        finish[(n, -(-self.n_out // WIDTH))](
            raw, raw.stride(0), factor, *self.out, self.bias, *self.residual, self.n_out, self.activation, WIDTH
        )

    def _tiles(self, n: int, halves: Halves, raw: Array) -> None:
        """Weights become f16 in registers."""
        part, (n_row, units) = self.part, self.memory.tuning.tile
        matmul_tile[(-(-part.n_out // n_row),)](
            part.w, halves.xh, raw, part.n_out, part.n_in, part.n_unit, raw.stride(0), PANEL=part.panel,
            M=max(16, triton.next_power_of_2(n)), N=n_row, UNITS=units, num_warps=4,
        )  # fmt: skip

    def _in_memory(self, xh: Array, raw: Array) -> None:
        """Weights become f16 in memory, some rows at a time."""
        part, weights = self.part, self.memory.scratch["weights"]
        step = max(1, len(weights) // part.n_in)
        for first in range(0, part.n_out, step):
            n_row = min(step, part.n_out - first)
            w = weights[: n_row * part.n_in].view(n_row, part.n_in)
            dequantize[(-(-n_row // 16), -(-part.n_unit // 8))](
                part.w, None, first, w, part.n_in, n_row, part.n_in, part.n_unit, 1.0, part.panel, N=16, UNITS=8
            )
            multiply(xh, w, raw[:, first : first + n_row])


def multiply(x: Array, w: Array, out: Array) -> None:
    """out f32 = x @ w.T of f16, summed in f32."""
    if x.is_cuda and torch.version.hip:  # which may lack out_dtype
        out.copy_(torch.mm(x, w.T))
    elif x.is_cuda:
        torch.mm(x, w.T, out_dtype=torch.float32, out=out)
    else:
        torch.mm(x.float(), w.float().T, out=out)


def _part_products(product: FusedMatmul, memory: Memory) -> list[PartProduct]:
    """Bind the product of each part of a matrix."""
    op, few, parts, first = product.op, product.few, [], 0
    activation = op.activation if isinstance(op, MatmulGated) else None
    residual = op.residual if isinstance(op, Matmul) else None
    for part in op.weight.parts:
        bias = None if op.bias is None else op.bias[first : first + part.n_out]
        out = op.out if activation else op.out.columns(first, part.n_out)
        added = memory.strided(residual and residual.columns(first, part.n_out))
        int8 = memory.int8(op.x) if few and part.is_int else None
        halves = memory.halves(op.x) if not few and part.panel.scales != "F32" else None
        x = memory.rows(op.x)
        parts.append(PartProduct(memory, part, x, memory.strided(out), bias, added, activation, int8, halves))
        first += part.n_out
        memory.want(counts=-(-part.n_out // BLOCK))
        if not few:
            memory.want(raw=memory.n_row(op.x) * result_width(part.n_out), weights=min(SCRATCH, part.n_out * part.n_in))
    return parts


def bind_matmul(product: FusedMatmul, memory: Memory) -> Launch:
    """Return a function that launches a product for so many rows."""
    parts = _part_products(product, memory)
    if not product.few:

        def many(n: int) -> None:
            for part in parts:
                part.many(n)

        return many
    norms = tuple((op.weight, *memory.strided(op.out), op.eps, *memory.strided(op.residual)) for op in product.norms)
    last: Buffer = product.norms[-1].out if product.norms else product.op.out
    made = memory.int8(last) if product.forms else None

    def few(n: int) -> None:
        for part in parts:
            part.few(n, made, norms)

    return few
