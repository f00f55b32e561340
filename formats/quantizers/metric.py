"""Second moments H = E[x xT] of a matrix's input, made ready for rounding: shrunk, in order, factorized."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.frozen import frozen

_DAMPING = 0.01  # part of the mean of diag(H) that is added to it
_DOUBLE = 4096  # columns up to which the factor is computed in float64

_Matrix = NDArray[np.floating[Any]]


@frozen
class Metric:
    """What rounding needs to know of an input. Columns are in the order of processing."""

    moments: NDArray[np.float32]  # [n, n] H as it counts: shrunk to its diagonal, and damped
    factor: NDArray[np.float32]  # [n, n] U, upper triangular, so that UT U is the inverse of moments
    order: NDArray[np.int64]  # [n / block]: which block of the matrix comes first, second, ...
    block: int  # columns of a block

    @property
    def importance(self) -> NDArray[np.float32]:
        """What an error in each column costs, f32[n], once the columns after it have made up for it."""
        return np.diag(self.factor) ** -2


def memory_for(n: int) -> int:
    """Return how many bytes `make_metric` needs for n columns, the moments and the result included."""
    return n * n * (42 if n <= _DOUBLE else 28)


def make_metric(moments: NDArray[np.float32], block: int, rho: float, by_mass: bool) -> Metric:
    """Return the metric of finite moments f32[n, n], for types with blocks of so many columns.

    rho: off the diagonal, moments shrink to (1 - rho) H. If H has no Cholesky factor, rho goes half the way to 1, and
    again.
    by_mass: the block with the largest sum of diag(H) comes first. Else blocks go from left to right.
    """
    n = len(moments)
    diagonal = np.diag(moments).astype(np.float64)
    order = np.arange(n // block)
    if by_mass:
        order = np.argsort(-diagonal.reshape(-1, block).sum(axis=1), kind="stable")
    columns = np.arange(n).reshape(-1, block)[order].reshape(-1)
    diagonal = diagonal[columns] + _DAMPING * max(diagonal.mean(), 1e-20)
    h: _Matrix = moments[np.ix_(columns, columns)].astype(np.float64 if n <= _DOUBLE else np.float32)
    while True:
        shrunk = h * (1 - rho)
        np.fill_diagonal(shrunk, diagonal)
        try:
            # For J, which reverses columns, and J H J = L LT, the inverse of J L J is U.
            lower = np.linalg.cholesky(shrunk[::-1, ::-1])
        except np.linalg.LinAlgError:
            rho = (1 + rho) / 2
        else:
            break
    factor = np.ascontiguousarray(_inverse(lower)[::-1, ::-1], np.float32)
    return Metric(shrunk.astype(np.float32), factor, order, block)


def _inverse(lower: _Matrix) -> _Matrix:
    """Return the inverse of a lower triangular matrix, by halves: nearly all of the work is products of matrices."""
    n = len(lower)
    if n <= 64:
        return np.linalg.inv(lower)
    half, out = n // 2, np.zeros_like(lower)
    out[:half, :half], out[half:, half:] = _inverse(lower[:half, :half]), _inverse(lower[half:, half:])
    out[half:, :half] = -out[half:, half:] @ (lower[half:, :half] @ out[:half, :half])
    return out
