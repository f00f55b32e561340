"""Quantizers of the small rest: F32 F16 BF16."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from gguf_run.formats.jit import njit
from gguf_run.formats.quantize_legacy import Quantizer
from gguf_run.formats.scalars import half_bits


@njit
def _f16(x: Any, n: int, importance: Any, out: Any) -> None:
    halves = out.view(np.uint16)
    for i in range(len(x)):
        halves[i] = half_bits(x[i])


@njit
def _bf16(x: Any, n: int, importance: Any, out: Any) -> None:
    """The upper half of an f32, rounded to nearest, halves to even."""
    bits, halves = x.view(np.uint32), out.view(np.uint16)
    for i in range(len(x)):
        halves[i] = (bits[i] + 0x7FFF + (bits[i] >> 16 & 1)) >> 16


def _f32(x: Any, n: int, importance: Any, out: Any) -> None:
    out[:] = x.view(np.uint8)


SMALL_QUANTIZERS: Mapping[str, Quantizer] = MappingProxyType({"F32": _f32, "F16": _f16, "BF16": _bf16})
