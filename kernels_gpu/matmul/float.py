"""matmul of float panels for few tokens, in f32. A thread multiplies 16 bytes of each of R rows at a time."""

import triton
import triton.language as tl

from gguf_run.kernels_gpu.matmul.decode import store_sums
from gguf_run.kernels_gpu.panels.units import added, zeros


@triton.jit
def matmul_float(
    qs, x, x_stride, out, out_stride, bias, residual, residual_stride, n_out, n_in, n_unit,
    TYPE: tl.constexpr, M: tl.constexpr, R: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """out[m, o] = w[o] * x[m] (+ bias[o]) (+ residual[m, o]) for M tokens, R rows a program. TYPE: of the panel."""
    E: tl.constexpr = 4 if TYPE == "F32" else 8
    first = tl.program_id(0) * R
    e = tl.arange(0, E)[None, :]
    sums = zeros(M * R, UNITS)
    for start in range(0, n_unit, UNITS):
        u = start + tl.arange(0, UNITS)
        units = tl.minimum(u, n_unit - 1)[:, None] * E + e
        column = u[:, None] * E + e
        rows = ()
        for r in tl.static_range(R):
            at = tl.minimum(first + r, n_out - 1).to(tl.int64) * (n_unit * E) + units
            if TYPE == "F32":
                rows = rows + (tl.load(qs.to(tl.pointer_type(tl.float32)) + at),)
            elif TYPE == "F16":
                rows = rows + (tl.load(qs.to(tl.pointer_type(tl.float16)) + at).to(tl.float32),)
            else:
                words = tl.load(qs.to(tl.pointer_type(tl.uint16)) + at).to(tl.int32)
                rows = rows + ((words << 16).to(tl.float32, bitcast=True),)
        values = ()
        for m in tl.static_range(M):
            x_m = tl.load(x + m * x_stride + column, mask=column < n_in, other=0.0)
            for r in tl.static_range(R):
                values = values + (tl.sum(rows[r] * x_m, axis=1),)
        sums = added(sums, values)
    store_sums(sums, first, out, out_stride, bias, residual, residual_stride, n_out, M, R, None)
