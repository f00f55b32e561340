"""Memory for activations in the forms that matmul reads (quantize.py), and who fills it."""

from dataclasses import dataclass

import torch
from torch import Tensor as Array

from gguf_run.kernels_gpu.panels.memory import GpuBuffer
from gguf_run.kernels_gpu.rows.quantize import BLOCK, halve, quantize

_WIDTH = 1024


@dataclass(frozen=True)
class Int8:
    """Blocks of int8: xq int32[rows, n / 4], xd f32[rows, n / 32], xs int32[rows, n / 32]."""

    xq: Array
    xd: Array
    xs: Array

    @classmethod
    def empty(cls, n_row: int, n: int, device: torch.device) -> "Int8":
        xq = torch.zeros(n_row, n // 4, dtype=torch.int32, device=device)
        xd = torch.zeros(n_row, n // BLOCK, device=device)
        return cls(xq, xd, torch.zeros_like(xd, dtype=torch.int32))

    def fill(self, x: GpuBuffer, n_row: int) -> None:
        n = x.width
        quantize[(n_row, -(-n // _WIDTH))](x.data, x.stride, n, self.xq, self.xd, self.xs, _WIDTH)


@dataclass(frozen=True)
class Halves:
    """xh f16[rows, n] and a factor for each row, xm f32[rows]."""

    xh: Array
    xm: Array

    @classmethod
    def empty(cls, n_row: int, n: int, device: torch.device) -> "Halves":
        return cls(torch.zeros(n_row, n, dtype=torch.float16, device=device), torch.zeros(n_row, device=device))

    def fill(self, x: GpuBuffer, n_row: int) -> None:
        halve[(n_row,)](x.data, x.stride, x.width, self.xh, self.xm, power_of_2(x.width))


@dataclass
class Forms:
    """The forms of a buffer's present contents that something wants. by_producer: those that the op that made these
    fills itself."""

    by_producer: tuple[str, ...] = ()
    int8: Int8 | None = None
    halves: Halves | None = None


def power_of_2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()
