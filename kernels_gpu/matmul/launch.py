"""Launches of matmul: which kernels multiply how many tokens with a matrix."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor as Array

from gguf_run.kernels_gpu.buffers import Halves, Int8, Launch, Memory, Strided
from gguf_run.kernels_gpu.device.tuning import SCRATCH, WIDTH, Tuning
from gguf_run.kernels_gpu.fuse import BLOCK, FusedMatmul
from gguf_run.kernels_gpu.matmul.decode import matmul_decode, matmul_float
from gguf_run.kernels_gpu.matmul.mma import matmul_mma
from gguf_run.kernels_gpu.matmul.tiles import finish
from gguf_run.kernels_gpu.panels.fields import dequantize
from gguf_run.kernels_gpu.panels.memory import WeightPart
from gguf_run.models.operands import Buffer
from gguf_run.models.ops import Matmul, MatmulGated

_Norm = tuple[Array, Array | None, int, float, Array | None, int]  # see matmul_decode
_WARPS = 4  # of a program of matmul_mma


def units_at_once(n_unit: int) -> int:
    """Return the threads for a row of n_unit units: 4, 2 or 1 warps, whichever leaves the fewest threads idle."""
    return min((128, 64, 32), key=lambda units: (-(-n_unit // units) * units, -units))


def result_width(n_out: int) -> int:
    """Return the columns of memory for a result of n_out columns: rows are aligned."""
    return -(-n_out // 16) * 16


@dataclass(frozen=True)
class Split:
    """How matmul_mma divides a product among programs."""

    m: int  # tokens of a program
    tiles: int  # of 16 rows of the matrix, of a warp
    grid: tuple[int, int, int]  # programs for all tokens, for all rows, for the parts of a row
    n_block: int  # of 256 columns of the matrix

    @classmethod
    def of(cls, part: WeightPart, n: int, tuning: Tuning) -> "Split":
        """Divide a product of n tokens."""
        n_token, n_block = -(-n // 64), -(-part.n_in // 256)
        m = -(-n // (8 * n_token)) * 8
        tiles, n_program = tuning.mma_tiles(m)
        n_row = -(-part.n_out // (16 * tiles * _WARPS))
        n_part = max(1, min(n_block // 2, n_program // (n_row * n_token)))
        return cls(m, tiles, (n_token, n_row, n_part), n_block)

    @property
    def n_sums(self) -> int:
        """The numbers that programs store for the last one of a tile to add."""
        n_token, n_row, n_part = self.grid
        return n_token * n_row * n_part * (16 * self.tiles * _WARPS) * self.m if n_part > 1 else 0


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
        if self.halves is not None and n <= self.memory.tuning.small:
            self._in_registers(n, self.halves)
            return
        raw = self.memory.scratch["raw"][: n * width].view(n, width)[:, : part.n_out]
        if self.halves is None:
            torch.mm(self.x[:n], part.qs.view(torch.float32)[:, : part.n_in].T, out=raw)
        else:
            self._in_memory(self.halves.xh[:n, : part.n_in], raw)
        factor = None if self.halves is None else self.halves.xm
        finish[(n, -(-self.n_out // WIDTH))](
            raw, raw.stride(0), factor, *self.out, self.bias, *self.residual, self.n_out, self.activation, WIDTH
        )

    def _in_registers(self, n: int, halves: Halves) -> None:
        """Weights become f16 in registers."""
        part, split = self.part, Split.of(self.part, n, self.memory.tuning)
        matmul_mma[split.grid](
            part.w, halves, *self.out, self.bias, *self.residual, self.n_out, part.n_unit, split.n_block,
            self.memory.scratch["raw"], self.memory.scratch["counts"], PANEL=part.panel, M=split.m,
            EIGHTS=self.memory.eights(halves, n), TILES=split.tiles, THREADS=32 * _WARPS,
            EVEN=part.n_unit * part.panel.unit == 256 * split.n_block, SPLIT=split.grid[2] > 1,
            ACTIVATION=self.activation, num_warps=_WARPS,
        )  # fmt: skip

    def _in_memory(self, xh: Array, raw: Array) -> None:
        """Weights become f16 in memory, some rows at a time."""
        part, weights = self.part, self.memory.scratch["weights"]
        step, (n, units) = max(1, len(weights) // part.n_in), self.memory.tuning.dense
        for first in range(0, part.n_out, step):
            n_row = min(step, part.n_out - first)
            w = weights[: n_row * part.n_in].view(n_row, part.n_in)
            dequantize[(-(-n_row // n), -(-part.n_unit // units))](
                part.w, None, first, w, part.n_in, n_row, part.n_in, part.n_unit, 1.0, part.panel, N=n, UNITS=units
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
            n_row = memory.n_row(op.x)
            memory.want(raw=n_row * result_width(part.n_out), weights=min(SCRATCH, part.n_out * part.n_in))
            for n in range(8, min(n_row, memory.tuning.small) + 1, 8):
                split = Split.of(part, n, memory.tuning)
                memory.want(raw=split.n_sums, counts=split.grid[0] * split.grid[1])
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
