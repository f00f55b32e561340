"""Statistics of a tensor's weights, and the difference of two tensors. Both read a chunk of weights at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.gguf.tensors import Tensor

_CHUNK = 1 << 16  # weights, a multiple of every block size: their float64 stay in the processor's cache
_RELEASE = 256  # chunks between two calls that let the OS drop pages


@dataclass(frozen=True)
class TensorStatistics:
    """Statistics of a tensor's finite weights. All but the last are None if there is no finite weight."""

    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    rms: float | None
    zeros: float | None  # the part of the weights that is 0
    kurtosis: float | None  # 3 for a normal distribution, None if all weights are equal
    n_not_finite: int  # weights that are infinite or NaN


@dataclass(frozen=True)
class Difference:
    """How tensor b differs from tensor a. The first three are of the weights whose difference is finite."""

    rmse: float
    relative_rmse: float | None  # rmse / (RMS of a), None if a is all 0
    max_abs: float
    n_different: int  # weights that are different numbers
    n_not_finite: int  # weights among them whose difference is not finite


def reported(tensors: Sequence[Tensor], progress: Callable[[int, int], None]) -> Iterator[Tensor]:
    """Yield tensors. progress: called after each, with the bytes of those that are done and of all of them."""
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    for tensor in tensors:
        yield tensor
        done += tensor.nbytes
        progress(done, total)


def tensor_statistics(tensor: Tensor) -> TensorStatistics:
    """Return the statistics of a tensor, computed in float64. Needs a few megabytes of memory."""
    n = n_zero = n_not_finite = 0
    low, high, shift = np.inf, -np.inf, 0.0
    power = np.zeros(5)  # sums of (weight - shift)^k
    for (chunk,) in _chunks(tensor):
        x = chunk if np.isfinite(chunk.sum(dtype=np.float64)) else chunk[np.isfinite(chunk)]
        n_not_finite += len(chunk) - len(x)
        if not len(x):
            continue
        if n == 0:  # near the mean, so that little cancels; exact if all weights are equal
            shift = float(np.float32(x.mean(dtype=np.float64)))
        low, high = min(low, float(x.min())), max(high, float(x.max()))
        n, n_zero = n + len(x), n_zero + len(x) - int(np.count_nonzero(x))
        d = x.astype(np.float64) - shift
        d2 = d * d
        power += (len(x), d.sum(), d2.sum(), np.dot(d2, d), np.dot(d2, d2))
    if n == 0:
        return TensorStatistics(None, None, None, None, None, None, None, n_not_finite)
    _, m1, m2, m3, m4 = power / n
    mean, variance = shift + m1, max(0.0, m2 - m1 * m1)
    fourth = m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1**4
    return TensorStatistics(
        min=low,
        max=high,
        mean=float(mean),
        std=float(np.sqrt(variance)),
        rms=float(np.sqrt(mean * mean + variance)),
        zeros=n_zero / n,
        kurtosis=float(fourth / variance**2) if variance else None,
        n_not_finite=n_not_finite,
    )


def difference(a: Tensor, b: Tensor) -> Difference | None:
    """Compare two tensors of one shape in float64. None if types and bytes agree. Needs a few megabytes of memory."""
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
            d[x == y] = 0.0  # also where both are the same infinity
            bad = ~np.isfinite(d)
            n_not_finite += int(np.count_nonzero(bad))
            d[bad] = 0.0
            size = np.square(x[np.isfinite(x)], dtype=np.float64).sum()
        n_different += int(np.count_nonzero(d))
        worst = max(worst, float(d.max()), -float(d.min()))
        square += float(np.dot(d, d))
        square_a += float(size)
    rmse = float(np.sqrt(square / max(1, a.n_elements)))
    relative = float(np.sqrt(square / square_a)) if square_a else None
    return Difference(rmse, relative, worst, n_different + n_not_finite, n_not_finite)


def _pieces(*tensors: Tensor) -> Iterator[tuple[NDArray[np.uint8], ...]]:
    """Yield the blocks of the same _CHUNK weights of every tensor, chunk by chunk."""
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
    """Yield the same _CHUNK weights of every tensor, chunk by chunk."""
    for pieces in _pieces(*tensors):
        yield [dequantize(piece, tensor.type) for piece, tensor in zip(pieces, tensors, strict=True)]
