"""How numba is imported when something must be compiled, and not before: that saves 0.55 s before the first token.

Most kernels are loaded as object files (machine_code.py), which needs no numba. But their modules name things of numba,
and decorate functions with it, as soon as Python reads them. These things are `Deferred`s until somebody needs them:

    @intrinsic
    def pointer(...)                                 pointer: a Deferred
    @njit
    def f32_at(address, n):                          f32_at: a Kernel, which is a Deferred
        return carray(pointer(address), n, ...)      carray: a Deferred

numba compiles the byte code of a function. It looks up each name in the function's globals, or in its closure, and must
find real things there. `resolved` (resolve.py) therefore makes a copy of the function for numba alone:

               function (Python's)              copy (numba's)
    code       C                                C
    globals    carray: Deferred                 carray: numba.carray
               pointer: Deferred                pointer: numba's intrinsic
    closure    (Kernel, 3)                      (numba's dispatcher, 3)

The original stays as it is. A Deferred makes its real thing once, at its first use, and that may make others.

Most helpers of kernels are called by compiled code alone. Their modules need not be read before something is compiled:

    if COMPILING:
        from gguf_run.kernels_cpu.matmul.tile import tile

Python skips this block when it reads a module. `resolved` runs the imports of the block when the first function of the
module is compiled. Only compiled code can use the names: for Python they do not exist.
"""

import functools
import importlib
import types
from collections.abc import Callable
from typing import Any

COMPILING = False  # see above


class Deferred:
    """Stands for a thing that `make` makes when it is first used. Attributes are those of the real thing."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    @functools.cached_property
    def real(self) -> Any:
        """The thing itself."""
        return self._make()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.real, name)


def imported(module: str, name: str) -> Any:
    """Return a Deferred for a name of a module, which is imported at its first use."""
    return Deferred(lambda: getattr(importlib.import_module(module), name))


def copied(function: Callable[..., Any], name: str, values: dict[str, Any], cells: tuple[Any, ...] = ()) -> Any:
    """Return a function of the same code with another name, other globals and another closure."""
    copy = types.FunctionType(function.__code__, values, name, function.__defaults__, cells)
    copy.__qualname__ = function.__qualname__.removesuffix(function.__name__) + name
    return copy
