"""Activations rounded to int8 or to FP8 (e4m3) and back: what vLLM 0.11 multiplies with for W8A8, number by number."""

import functools

import numpy as np

from gguf_run.formats.blocks.coded import CODED_FORMS
from gguf_run.formats.compiler.deferred import COMPILING
from gguf_run.kernels_cpu.replay.op import TapeOp, row_op

if COMPILING:
    from gguf_run.formats.quantizers.coded import e4m3
    from gguf_run.kernels_cpu.vector.native import f32_at

_TABLE = CODED_FORMS["FP8_E4M3"].table
_LEAST = np.float32(1 / (448 * 512))  # the least scale of a token's FP8


@functools.cache
def rounded(kind: str) -> TapeOp:
    """Return the op out[t] = d * code, where code is the int8 ("int8") or the FP8 ("fp8") nearest to x[t] / d.

    columns: share a d.
    scale: d. 0: the largest |x| of the columns becomes the largest code.
    """
    is_int8, last = kind == "int8", np.float32(127 if kind == "int8" else 448)

    @row_op("rows n columns x x_stride out out_stride", "scale")
    def rounded_rows(a, first, end):
        for t in range(first, end):
            for at in range(0, 4 * a.n, 4 * a.columns):
                x, out = f32_at(a.x + t * a.x_stride + at, a.columns), f32_at(a.out + t * a.out_stride + at, a.columns)
                d, most, is_static = np.float32(a.scale), np.float32(0), a.scale > 0
                for v in x:
                    most = max(most, abs(v))
                inverse = np.float32(1) / d if is_static else last / most if most > 0 else np.float32(0)
                if not is_static and a.columns < a.n:
                    d = max(most, np.float32(1e-10)) * np.float32(1 / 448)
                elif not is_static:
                    d = most / last if is_int8 else max(most / last, _LEAST)
                for i in range(a.columns):
                    v = x[i] * inverse if is_int8 != is_static else x[i] / d
                    if is_int8:
                        out[i] = min(max(np.rint(v), np.float32(-128)), last) * d
                    else:
                        out[i] = _TABLE[e4m3(min(max(v, -last), last))] * d

    return rounded_rows
