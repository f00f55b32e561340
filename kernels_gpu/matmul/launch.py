"""Which kernels multiply how many tokens with a matrix, and how they are launched."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor as Array

from gguf_run.kernels_gpu.matmul.decode import matmul_decode
from gguf_run.kernels_gpu.matmul.float import matmul_float
from gguf_run.kernels_gpu.matmul.tiles import dequantize, finish, matmul_tile
from gguf_run.kernels_gpu.panels.memory import GpuBuffer, WeightPart
from gguf_run.kernels_gpu.panels.panels import IntPanel
from gguf_run.kernels_gpu.rows.activations import Forms, Halves, Int8, power_of_2

FEW = 8  # tokens that matmul_decode takes, at most
SCRATCH = 1 << 26  # weights that are f16 at a time
_WIDTH = 1024


@dataclass(frozen=True)
class Tuning:
    """How an architecture likes its products. small: tokens for which matmul_tile, which takes up to 64, is faster than
    dequantizing to memory and multiplying there. tile: its rows and units. rows: of matmul_decode, by the number of
    tokens. programs: of attention for a few tokens, about two for each multiprocessor."""

    small: int = 64
    tile: tuple[int, int] = (64, 4)
    rows: tuple[tuple[int, int], ...] = ((1, 4), (2, 2), (4, 2), (8, 1))
    programs: int = 264


DEFAULT = Tuning()
# By compute capability; what is missing takes DEFAULT. Computed, not measured: two programs on each multiprocessor of
# an A100, RTX 3090, RTX 4090, H100 and B200. Tiles: 8 to 15 instructions a weight (Q4_K), whose memory is read once;
# dequantizing: 8, and four bytes more to write and to read.
TUNINGS = {80: Tuning(programs=216), 86: Tuning(programs=164), 89: Tuning(programs=256), 90: Tuning(programs=264)}
TUNINGS |= {100: Tuning(programs=256)}  # no more: runtime.load.memory counts with 264


def units_at_once(n_unit: int) -> int:
    """Threads for a row: those of 4, 2 or 1 warps, as few idle ones as can be."""
    return min((128, 64, 32), key=lambda units: (-(-n_unit // units) * units, -units))


@dataclass(frozen=True)
class Scratch:
    """Memory that all products of a program share. weights: f16, raw: f32, as much as the largest result takes."""

    weights: Array
    raw: Array

    def result(self, n_row: int, n_out: int) -> Array:
        """f32[n_row, n_out]; the rows are aligned."""
        width = result_width(n_out)
        return self.raw[: n_row * width].view(n_row, width)[:, :n_out]


def result_width(n_out: int) -> int:
    return -(-n_out // 16) * 16


@dataclass(frozen=True)
class Norm:
    """An RMS norm (+ residual) of a product's rows, which the product's last program does."""

    weight: Array
    out: GpuBuffer
    eps: float
    residual: GpuBuffer | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        residual = (self.residual.data, self.residual.stride) if self.residual else (None, 0)
        return self.weight, self.out.data, self.out.stride, self.eps, *residual


NO_NORM = (None, None, 0, 0.0, None, 0)


@dataclass
class After:
    """What a product of a few tokens does with its result: norms, the second one of what the first one makes, and forms
    of what comes last. counts: a list of one, memory for the programs that are ready."""

    forms: Forms
    counts: list[Array]
    norms: list[Norm] = field(default_factory=list)


@dataclass(frozen=True)
class Product:
    """One part of a matrix, rows `first` .. of it, times x. activation: gate and up halves, see matmul_decode."""

    part: WeightPart
    first: int
    x: GpuBuffer
    out: GpuBuffer
    bias: Array | None
    residual: GpuBuffer | None
    activation: str | None
    tuning: Tuning

    @property
    def n_out(self) -> int:
        """Columns that are written."""
        return self.part.n_out // (1 if self.activation is None else 2)

    def _ends(self) -> tuple[Array, Array | None, Array | None, int]:
        """out, bias and residual from this part's first row on, and the residual's stride."""
        bias = None if self.bias is None else self.bias[self.first :]
        if self.residual is None:
            return self.out.data[:, self.first :], bias, None, 0
        return self.out.data[:, self.first :], bias, self.residual.data[:, self.first :], self.residual.stride

    def few(self, n: int, q8: Int8 | None, after: "After | None" = None) -> None:
        """n tokens, a bucket up to FEW. after: for integer panels only."""
        part, n_unit = self.part, self.part.n_unit
        out, bias, residual, residual_stride = self._ends()
        n_row = dict(self.tuning.rows)[n]
        units = units_at_once(n_unit)
        if not isinstance(part.panel, IntPanel):
            matmul_float[(-(-part.n_out // n_row),)](
                part.qs, self.x.data, self.x.stride, out, bias, residual, part.n_out, part.n_in, n_unit,
                self.out.stride, residual_stride, part.panel.name, n, n_row, units, num_warps=units // 32,
            )  # fmt: skip
            return
        assert q8 is not None
        if self.activation is not None:
            n_row = max(2, n_row)
        per_program = n_row if self.activation is None else n_row // 2
        made = after.forms.int8 if after else None
        norms = after.norms if after else []
        matmul_decode[(-(-self.n_out // per_program),)](
            part.qs, part.high, part.scale, part.d, q8.xq, q8.xd, q8.xs, out, bias, residual, self.n_out, n_unit,
            self.out.stride, residual_stride, *((made.xq, made.xd, made.xs) if made else (None, None, None)),
            after.counts[0] if after else None, *(norms[0].arguments if norms else NO_NORM),
            *(norms[1].arguments[:4] if norms[1:] else NO_NORM[:4]), **part.panel.constants, M=n, R=n_row, UNITS=units,
            EVEN=n_unit % units == 0, ACTIVATION=self.activation,
            WIDTH=max(32, power_of_2(self.n_out)), num_warps=units // 32,
        )  # fmt: skip

    def many(self, n: int, halves: Halves | None, scratch: Scratch) -> None:
        """More than FEW tokens."""
        raw = scratch.result(n, self.part.n_out)
        if self.part.panel.constants["SCALES"] == "F32":
            torch.mm(self.x.data[:n], self.part.qs.view(torch.float32)[:, : self.part.n_in].T, out=raw)
            factor = None
        else:
            assert halves is not None
            factor = halves.xm
            if n <= self.tuning.small:
                self._tiles(n, halves, raw)
            else:
                self._in_memory(halves.xh[:n], raw, scratch.weights)
        out, bias, residual, residual_stride = self._ends()
        finish[(n, -(-self.n_out // _WIDTH))](
            raw, raw.stride(0), factor, out, self.out.stride, bias, residual, residual_stride, self.n_out,
            self.activation, _WIDTH,
        )  # fmt: skip

    def _tiles(self, n: int, halves: Halves, raw: Array) -> None:
        part, (n_row, units) = self.part, self.tuning.tile
        matmul_tile[(-(-part.n_out // n_row),)](
            part.qs, part.high, part.scale, part.d, halves.xh, raw, part.n_out, part.n_in, part.n_unit,
            raw.stride(0), **part.panel.constants, M=max(16, power_of_2(n)), N=n_row, UNITS=units, num_warps=4,
        )  # fmt: skip

    def _in_memory(self, xh: Array, raw: Array, weights: Array) -> None:
        part = self.part
        step = max(1, len(weights) // part.n_in)
        for first in range(0, part.n_out, step):
            n_row = min(step, part.n_out - first)
            w = weights[: n_row * part.n_in].view(n_row, part.n_in)
            grid = (-(-n_row // 16), -(-part.n_unit // 8))
            dequantize[grid](
                part.qs, part.high, part.scale, part.d, w, first, n_row, part.n_in, part.n_unit,
                **part.panel.constants, N=16, UNITS=8,
            )  # fmt: skip
            multiply(xh, w, raw[:, first : first + n_row])


def multiply(x: Array, w: Array, out: Array) -> None:
    """out f32 = x @ w.T of f16, summed in f32."""
    if x.is_cuda and torch.version.hip:  # which may lack out_dtype
        out.copy_(torch.mm(x, w.T))
    elif x.is_cuda:
        torch.mm(x, w.T, out_dtype=torch.float32, out=out)
    else:
        torch.mm(x.float(), w.float().T, out=out)
