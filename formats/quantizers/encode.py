"""The loop of the quantizers, which work on LANES blocks at once: one block in each lane (see lanes.py)."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.types import TensorType, type_by_name
from gguf_run.formats.compiler.jit import njit, specialize
from gguf_run.formats.quantizers.lanes import LANES, f32, fabs, numbers, scratch_f32, scratch_u8, to_int, where

# Quantizes rows in one thread, without the GIL: (weights f32[n_rows * n], n, importance f32[n] or f32[0], out u8[:]).
Quantizer = Callable[[NDArray[np.float32], int, NDArray[np.float32], NDArray[np.uint8]], None]

_ROWS = 8  # rows whose squares are summed side by side


@njit(forceinline=True)
def cut(v: Any) -> Any:
    """C's (int) v, without the fraction; 0 for infinity, NaN and numbers that do not fit.

    x86 makes -2**31 of these. Quantizers keep the low byte only, and that is 0 too.
    """
    return where(fabs(v) < np.float32(2.0**31), to_int(v), 0)


@njit(forceinline=True)
def roundf(v: Any) -> Any:
    """C's roundf, then `cut`: to nearest, halves away from zero, for |v| < 2**22.

    It adds the float before 0.5, because 0.49999997 + 0.5 is 1.
    """
    return cut(v + where(v >= 0, f32(np.float32(0.49999997)), np.float32(-0.49999997)))


@njit
def _mean_squares(x: Any, n: int) -> Any:
    """The mean square of each row of n weights in x: f32[len(x) // n]. Each row is summed from left to right."""
    sums = np.zeros(len(x) // n, np.float32)
    for first in range(0, len(sums), _ROWS):
        some = sums[first : first + _ROWS]
        for i in range(n):
            for r in range(len(some)):
                v = x[(first + r) * n + i]
                some[r] += v * v
    return sums / np.float32(n)


# Placeholders: specialize() replaces them by the values of a type.
BLOCK_SIZE = TYPE_SIZE = 0
NEEDS_MEAN = False
encode: Any = None


def _quantize(x: Any, n: Any, importance: Any, out: Any) -> None:
    xs, ws, q = scratch_f32(BLOCK_SIZE), scratch_f32(BLOCK_SIZE), scratch_f32(BLOCK_SIZE)
    mean, block = scratch_f32(1), scratch_u8(TYPE_SIZE)
    numbers_x, numbers_w, numbers_mean, octets = numbers(xs), numbers(ws), numbers(mean), numbers(block)
    weighted = len(importance) > 0
    if NEEDS_MEAN:
        means = _mean_squares(x, n) if weighted else np.zeros(len(x) // n, np.float32)
    n_blocks = len(x) // BLOCK_SIZE
    for first in range(0, n_blocks, LANES):
        n_lanes = min(LANES, n_blocks - first)  # the other lanes work too, on old contents; nobody reads their results
        for lane in range(n_lanes):
            at = (first + lane) * BLOCK_SIZE
            for i in range(BLOCK_SIZE):
                numbers_x[i * LANES + lane] = x[at + i]
            if weighted:
                for i in range(BLOCK_SIZE):
                    numbers_w[i * LANES + lane] = importance[at % n + i]
            if NEEDS_MEAN:
                numbers_mean[lane] = means[at // n]
        if NEEDS_MEAN:
            encode(xs, ws, mean[0], q, block, weighted)
        else:
            encode(xs, ws, q, block, weighted)
        for lane in range(n_lanes):
            for i in range(TYPE_SIZE):
                out[(first + lane) * TYPE_SIZE + i] = octets[i * LANES + lane]


def block_quantizers(label: str = "", *, needs_mean: bool = False, **encoders: Any) -> dict[str, Quantizer]:
    """Return quantizers by type, from encoders by type. The label tells apart several of a type.

    A quantizer calls its encoder for each LANES blocks:

    encode(x, importance, [mean,] q, block, weighted)
        x           CPointer(F32) [block_size]: the weights
        importance  CPointer(F32) [block_size]: their importance, if weighted is true
        mean        F32: the mean square of each block's row, if needs_mean is true
        q           CPointer(F32) [block_size]: work space
        block       CPointer(U8) [type_size]: the result
    """

    def quantizer(type: TensorType, encode: Any) -> Quantizer:
        sizes = {"BLOCK_SIZE": type.block_size, "TYPE_SIZE": type.type_size}
        return specialize(_quantize, type.name + label, encode=encode, NEEDS_MEAN=needs_mean, **sizes)

    return {name: quantizer(type_by_name(name), encode) for name, encode in encoders.items()}
