"""An op of a tape: a compiled function, and the record of arguments that it reads.

`@op("x y n", "scale")` declares a function `f(args, piece, ith, nth)`. `carray(args, 1)[0]` is the record: int64 fields
(counts, strides, addresses), then float64 fields. The function returns the number of pieces of its work in this step if
piece < 0, and does nothing. Else it does that piece, as thread `ith` of `nth`. Pieces run in any order and at the same
time. Most ops are declared by `row_op`, which is simpler.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.compiler.deferred import COMPILING
from gguf_run.formats.compiler.jit import carray, njit
from gguf_run.formats.compiler.machine_code import Entry

if COMPILING:
    from gguf_run.kernels_cpu.vector.native import i64_at

PER_THREAD = 4  # pieces of an op for each thread, when threads progress evenly
SHRINKING = 8  # the same for pieces of shrinking size


class TapeOp:
    """A function of a tape. It is compiled, or loaded from the cache, when its address is first asked for."""

    def __init__(self, function: Callable[..., None], fields: np.dtype, options: dict[str, Any]) -> None:
        self.function, self.fields, self.options = function, fields, options

    @functools.cached_property
    def compiled(self) -> Entry:
        entry = njit(self.function, **self.options).entry((self.fields, "i8", "i8", "i8"))
        assert entry is not None, f"{self.function.__name__} does not return a number"
        return entry

    def bind(self, **values: Any) -> NDArray[np.void]:
        """Return one record of arguments. Every field must have a value."""
        names = self.fields.names or ()
        if different := values.keys() ^ set(names):
            raise TypeError(f"{self.function.__name__}: arguments differ from fields: {sorted(different)}")
        return np.array([tuple(values[name] for name in names)], self.fields)


def op(integers: str, floats: str = "", **options: Any) -> Callable[[Callable[..., None]], TapeOp]:
    """Declare an op with int64 and float64 fields (names separated by blanks); options go to numba."""
    fields = np.dtype([(name, "i8") for name in integers.split()] + [(name, "f8") for name in floats.split()])
    return lambda function: TapeOp(function, fields, options)


@njit(inline="always")
def n_pieces(n, grain, nth):
    """The number of pieces of n items: each has `grain` items or more, and a thread has a few pieces at most."""
    return max(1, min((n + grain - 1) // grain, PER_THREAD * nth))


@njit(inline="always")
def items(piece, n, grain, nth):
    """The items (first, end) of a piece of n_pieces equal ones."""
    pieces = n_pieces(n, grain, nth)
    return n * piece // pieces, n * (piece + 1) // pieces


@njit(inline="always")
def n_rows(a):
    """The number of rows of this step. Its address is in the field `rows`."""
    return i64_at(a.rows, 1)[0]


def row_op(
    integers: str, floats: str = "", *, n_items: Callable[[Any], Any] = n_rows, grain: int = 1, **options: Any
) -> Callable[[Callable[..., None]], TapeOp]:
    """Declare an op whose work is n_items(a) items, by a function `f(a, first, end)` that does the items from first on.

    a: the record. grain: the fewest items of a piece. The rest is as in `op`.
    """

    def declare(function: Callable[..., None]) -> TapeOp:
        count = n_items if n_items is n_rows else njit(n_items, inline="always")
        work = njit(function, inline="always")

        def run(args, piece, ith, nth):
            a = carray(args, 1)[0]
            n = count(a)
            if piece < 0:
                return n_pieces(n, grain, nth)
            first, end = items(piece, n, grain, nth)
            work(a, first, end)
            return 0

        run.__name__, run.__qualname__, run.__module__ = function.__name__, function.__qualname__, function.__module__
        return op(integers, floats, **options)(run)

    return declare


@njit(inline="always")
def n_shrinking(n, grain, nth):
    """The number of pieces of shrinking size for n items: see `shrinking`. The smallest has about `grain` items."""
    return 1 if nth == 1 else max(1, min(SHRINKING * nth, int(math.sqrt(2 * n / grain + 0.25) - 0.5)))


@njit(inline="always")
def shrinking(piece, n, pieces):
    """The items (first, end) of a piece: i + 1 shares for piece i, from the last piece to the first.

    Pieces are taken in this order, the large ones before the small ones. Large pieces seldom interrupt the stream of
    weights. Small pieces at the end let all threads end together (trapezoid self-scheduling, Tzen and Ni 1993). Memory
    is read upwards: what is prefetched behind the last piece is the start of the next matrix.
    """
    whole = pieces * (pieces + 1)
    return n - n * (piece + 1) * (piece + 2) // whole, n - n * piece * (piece + 1) // whole
