"""Quantizers of types of checkpoints: INT8 and FP8 with one scale for a row, NF4. They take no importance."""

from typing import Any

import numpy as np

from gguf_run.formats.blocks.coded import CODED_FORMS, CODES_AT
from gguf_run.formats.compiler.jit import njit, specialize
from gguf_run.formats.quantizers.encode import Quantizer

_NF4 = CODED_FORMS["NF4"].table
_BETWEEN = (_NF4[1:] + _NF4[:-1]) / 2


@njit(forceinline=True)
def _largest(x: Any) -> Any:
    most = np.float32(0)
    for v in x:
        most = max(most, abs(v))
    return most


@njit(forceinline=True)
def e4m3(v: Any) -> Any:
    """The code nearest to v, |v| <= 448, halves to even."""
    bits = np.int64(np.float32(v).view(np.int32))
    rest = bits & 0x7FFFFFFF
    code: Any = np.int64(np.rint(abs(v) * np.float32(512)))  # below 2^-6: subnormal
    if rest >= 121 << 23:
        code = min(((rest + 0x7FFFF + (rest >> 20 & 1)) >> 20) - (120 << 3), 126)
    return np.uint8(code | (bits >> 24 & 0x80))


MOST = 0  # placeholder: specialize() replaces it


def _by_rows(x: Any, n: Any, importance: Any, out: Any) -> None:
    for row in range(len(x) // n):
        values = x[row * n : row * n + n]
        d = np.float32(_largest(values) / np.float32(MOST))
        for b in range(n // 32):
            at = (row * (n // 32) + b) * (32 + CODES_AT)
            out[at : at + CODES_AT].view(np.float32)[0] = d
            for i in range(32):
                v = values[32 * b + i] / d if d > 0 else np.float32(0)
                out[at + CODES_AT + i] = np.uint8(np.int64(np.rint(v))) if MOST == 127 else e4m3(v)


@njit
def _nf4(x: Any, n: Any, importance: Any, out: Any) -> None:
    for b in range(len(x) // 64):
        values, at = x[64 * b : 64 * b + 64], b * (32 + CODES_AT)
        d = _largest(values)
        out[at : at + CODES_AT].view(np.float32)[0] = d
        inverse = np.float32(1) / d if d > 0 else np.float32(0)
        for i in range(32):
            byte = 0
            for j in range(2):
                code = 0
                for between in _BETWEEN:
                    code += values[2 * i + j] * inverse > between
                byte = byte << 4 | code
            out[at + CODES_AT + i] = byte


CODED_QUANTIZERS: dict[str, Quantizer] = {
    "INT8": specialize(_by_rows, "INT8", MOST=127),
    "FP8_E4M3": specialize(_by_rows, "FP8_E4M3", MOST=448),
    "NF4": _nf4,
}
