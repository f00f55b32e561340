"""The orthonormal Walsh-Hadamard transform of the heads of a row: it spreads outliers before quantization.

The transform is its own inverse. q.k stays the same if both q and k are transformed. A block is the largest power of
two that divides head_dim (QuaRot, Ashkboos et al. 2024).
"""

import math

import numpy as np

from gguf_run.formats.compiler.jit import njit
from gguf_run.kernels_cpu.panels.panels import ROWS
from gguf_run.kernels_cpu.vector.lowering import simd_kernel
from gguf_run.kernels_cpu.vector.simd import F32, I32, Simd, Val


@simd_kernel(floats="factor")
def _within_vectors(s: Simd, x: Val, n: Val, factor: Val) -> None:
    """In each of n vectors, lane i = factor * sum over j of x[j] * (-1)^(number of bits that i and j share)."""

    def body(i: Val) -> None:
        value = s.load(x + i * 64, F32, ROWS)
        for bit in (1, 2, 4, 8):
            signs = s.constants(I32, [-1 if lane & bit else 1 for lane in range(ROWS)]).to(F32)
            value = s.fma(value, signs, s.shuffle(value, [lane ^ bit for lane in range(ROWS)]))
        s.store(value * s.splat(factor, ROWS), x + i * 64)

    s.each(n, body)


@simd_kernel
def _across_vectors(s: Simd, x: Val, n: Val, step: Val) -> None:
    """Replace vectors i and i + step by sum and difference, for all i < n without the bit `step`, a power of two."""

    def body(j: Val) -> None:
        low = j & (step - 1)
        at = x + (((j - low) << 1) + low) * 64
        a, b = (s.load(place, F32, ROWS) for place in (at, at + step * 64))
        s.store(a + b, at)
        s.store(a - b, at + step * 64)

    s.each(n >> 1, body)


@njit(inline="always")
def hadamard(x, n):
    """Transform f32[n] at x in place, n a multiple of 32."""
    block, step = n & -n, 1
    _within_vectors(x, n // ROWS, np.float32(1 / math.sqrt(block)))
    while step * ROWS < block:
        _across_vectors(x, n // ROWS, step)
        step *= 2
