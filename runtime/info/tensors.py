"""What the numbers of a tensor are like, and how far those of another are from them: a chunk of weights at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.gguf.tensors import Tensor

_CHUNK = 1 << 16  # weights: their float64 stay in the processor's cache; a multiple of every block
_RELEASE = 256  # chunks between two calls that let the OS drop what was read


@dataclass(frozen=True)
class Statistics:
    """Of the finite weights (None if there is none). zeros: the part that is 0. kurtosis: 3 for a normal distribution,
    None if all weights are the same. n_not_finite: how many are infinite or not a number."""

    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    rms: float | None
    zeros: float | None
    kurtosis: float | None
    n_not_finite: int


@dataclass(frozen=True)
class Difference:
    """Of b from a, over the weights where the difference is finite. relative_rmse: by the RMS of a, None if that is 0.
    n_different: weights that are not the same number; n_not_finite: those among them whose difference is not finite."""

    rmse: float
    relative_rmse: float | None
    max_abs: float
    n_different: int
    n_not_finite: int


def statistics(tensor: Tensor) -> Statistics:
    """Return a tensor's statistics, computed in float64. Memory: a few megabytes."""
    n = n_zero = n_not_finite = 0
    low, high, shift = np.inf, -np.inf, 0.0
    power = np.zeros(5)  # sums of (weight - shift)^k
    for (chunk,) in _chunks(tensor):
        x = chunk if np.isfinite(chunk.sum(dtype=np.float64)) else chunk[np.isfinite(chunk)]
        n_not_finite += len(chunk) - len(x)
        if not len(x):
            continue
        if n == 0:  # close to the mean, so that little cancels; and exactly the weights if all are the same
            shift = float(np.float32(x.mean(dtype=np.float64)))
        low, high = min(low, float(x.min())), max(high, float(x.max()))
        n, n_zero = n + len(x), n_zero + len(x) - int(np.count_nonzero(x))
        d = x.astype(np.float64) - shift
        d2 = d * d
        power += (len(x), d.sum(), d2.sum(), np.dot(d2, d), np.dot(d2, d2))
    if n == 0:
        return Statistics(None, None, None, None, None, None, None, n_not_finite)
    _, m1, m2, m3, m4 = power / n
    mean, variance = shift + m1, max(0.0, m2 - m1 * m1)
    fourth = m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1**4
    kurtosis = float(fourth / variance**2) if variance else None
    rms = np.sqrt(mean * mean + variance)
    return Statistics(low, high, float(mean), float(np.sqrt(variance)), float(rms), n_zero / n, kurtosis, n_not_finite)


def difference(a: Tensor, b: Tensor) -> Difference | None:
    """Compare two tensors of one shape; None if type and bytes are the same. float64, memory: a few megabytes."""
    if a.type is b.type and all(np.array_equal(x, y) for x, y in _pieces(a, b)):
        return None
    worst = square = square_a = 0.0
    n_different = n_not_finite = 0
    for x, y in _chunks(a, b):
        d = x.astype(np.float64)
        size = np.dot(d, d)
        with np.errstate(invalid="ignore"):
            d -= y
        if not np.isfinite(size + np.dot(d, d)):
            d[x == y] = 0.0  # of infinities too
            bad = ~np.isfinite(d)
            n_different += int(np.count_nonzero(bad))
            n_not_finite += int(np.count_nonzero(bad))
            d[bad] = 0.0
            size = np.square(x[np.isfinite(x)], dtype=np.float64).sum()
        n_different += int(np.count_nonzero(d))
        worst = max(worst, float(d.max()), -float(d.min()))
        square += float(np.dot(d, d))
        square_a += float(size)
    rmse = float(np.sqrt(square / a.n_elements))
    relative = float(np.sqrt(square / square_a)) if square_a else None
    return Difference(rmse, relative, worst, n_different, n_not_finite)


def _pieces(*tensors: Tensor) -> Iterator[tuple[NDArray[np.uint8], ...]]:
    """Yield the blocks of the same _CHUNK weights of each tensor."""
    blocks = [tensor.blocks().reshape(-1) for tensor in tensors]
    steps = [_CHUNK // tensor.type.block_size * tensor.type.type_size for tensor in tensors]
    for i in range(-(-tensors[0].n_elements // _CHUNK)):
        yield tuple(data[i * step : (i + 1) * step] for data, step in zip(blocks, steps, strict=True))
        if i % _RELEASE == 0:
            for tensor, step in zip(tensors, steps, strict=True):
                tensor.file.release(tensor.offset, min((i + 1) * step, tensor.nbytes))
    for tensor in tensors:
        tensor.release()


def _chunks(*tensors: Tensor) -> Iterator[list[NDArray[np.float32]]]:
    """Yield the same _CHUNK weights of each tensor."""
    for pieces in _pieces(*tensors):
        yield [dequantize(piece, tensor.type) for piece, tensor in zip(pieces, tensors, strict=True)]
