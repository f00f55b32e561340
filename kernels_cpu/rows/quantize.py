"""Activations for integer panels: f32 rows to blocks of 32 int8 values (layout: panels/panels.py)."""

from gguf_run.formats.compiler.jit import njit
from gguf_run.kernels_cpu.panels.panels import X_BLOCK_BYTES, X_D, X_D_SUMS, X_PAIR, X_SUM_FACTOR, X_SUMS
from gguf_run.kernels_cpu.replay.op import row_op
from gguf_run.kernels_cpu.vector.lowering import simd_kernel
from gguf_run.kernels_cpu.vector.simd import F32, I8, I16, I32, Simd, Val


@simd_kernel
def quantize_row(s: Simd, x: Val, n_block: Val, out: Val) -> None:
    """Quantize f32[32 * n_block] at x to blocks at out. Of each block: d = max|x| / 127, q = nearest to x / d."""

    def body(k: Val) -> None:
        halves = [s.load(x + k * 128 + 64 * h, F32, 16) for h in (0, 1)]
        largest = s.fold(s.maximum(s.absolute(halves[0]), s.absolute(halves[1])), s.maximum)
        d = largest / 127.0
        is_zero = largest.compare("==", 0.0)
        inverse = s.select(is_zero, s.const(F32, 0.0), s.const(F32, 127.0) / largest)
        at = out + k * X_BLOCK_BYTES
        q = s.concat(*[s.rint(half * s.splat(inverse, 16)).to(I8) for half in halves])
        s.store(q, at)
        sums = s.dot(s.const(I32, 0, 8), s.const(I8, 1, 32), q, 1)  # of four values each
        for n in (1, 2):
            sums = sums + s.shuffle(sums, [lane ^ n for lane in range(8)])
        both = sums + s.shuffle(sums, [lane ^ 4 for lane in range(8)])
        fields = s.shuffle(s.concat(both, sums), [0, 8, 12, 12])  # of all values, of each half, and one to fill up
        s.store(d, at + X_D)
        # The fourth lanes are overwritten: the fields follow each other.
        s.store(fields * X_SUM_FACTOR, at + X_SUMS)
        s.store(fields.to(F32) * s.splat(d, 4), at + X_D_SUMS)
        s.store(s.shuffle(fields.as_type(I16), [2, 4]), at + X_PAIR)

    s.each(n_block, body)


@njit(inline="always")
def quantize_if_wanted(q8, q8_stride, t, x, n):
    """Quantize f32[n] at x, which is row t of an op's result, into row t of q8; nothing if q8 is 0."""
    if q8:
        quantize_row(x, n // 32, q8 + t * q8_stride)


@row_op("rows n x x_stride q8 q8_stride")
def quantize(a, first, end):
    """q8[t] = x[t] quantized."""
    for t in range(first, end):
        quantize_row(a.x + t * a.x_stride, a.n // 32, a.q8 + t * a.q8_stride)
