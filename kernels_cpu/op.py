"""An op: one compiled function of a tape, and the record of arguments that it reads.

`@op("x y n", "scale")` declares a function `f(args, ith, nth)`; `carray(args, 1)[0]` shows the record with the named
fields, integers (counts, strides, addresses) first and floats after. Thread `ith` of `nth` runs it on its share of the
work. The field `counter`, where declared, is the address of an int64 that is 0 when the op starts: `take` deals out
pieces of work from it, so that a thread that is held up does less.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import from_dtype, types
from numpy.typing import NDArray

from gguf_run.formats.jit import cfunc, njit
from gguf_run.kernels_cpu.native import atomic_add


class Op:
    """A function of a tape. It is compiled, or loaded from the cache, when its address is first asked for."""

    def __init__(self, function: Callable[..., None], fields: np.dtype, options: dict[str, Any]) -> None:
        self.function, self.fields, self.options = function, fields, options

    @functools.cached_property
    def compiled(self) -> Any:
        signature = types.void(types.CPointer(from_dtype(self.fields)), types.intp, types.intp)
        return cfunc(signature, self.function, **self.options)

    def bind(self, **values: Any) -> NDArray[np.void]:
        """One record of arguments; every field must be given."""
        names = set(self.fields.names or ())
        if names != set(values):
            raise TypeError(f"{self.function.__name__}: arguments differ from fields: {sorted(names ^ set(values))}")
        record = np.zeros(1, self.fields)
        for name, value in values.items():
            record[name] = value
        return record


def op(integers: str, floats: str = "", **options: Any) -> Callable[[Callable[..., None]], Op]:
    """Declare an op with int64 and float64 fields (names separated by blanks); options go to numba."""
    fields = np.dtype([(name, "i8") for name in integers.split()] + [(name, "f8") for name in floats.split()])
    return lambda function: Op(function, fields, options)


@njit(inline="always")
def take(counter):  # type: ignore[no-untyped-def]
    """The number of the next piece of work."""
    return atomic_add(counter, 1)


@njit(inline="always")
def share(n, ith, nth):  # type: ignore[no-untyped-def]
    """Thread ith's range (first, end) of n pieces dealt out evenly beforehand."""
    return n * ith // nth, n * (ith + 1) // nth
