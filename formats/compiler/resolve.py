"""Puts the real things in the place of Deferreds before numba reads a function. deferred.py draws it."""

import ast
import functools
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llvmlite import binding

from gguf_run.formats.compiler.deferred import Deferred, copied
from gguf_run.formats.compiler.machine_code import host_features


def resolved(function: Callable[..., Any]) -> Any:
    """Return a copy of a function whose globals and closure hold the real things instead of Deferreds."""
    values = {**_helpers(function.__globals__["__name__"]), **function.__globals__}
    named = {name: _real(values[name]) for name in function.__code__.co_names if name in values}
    cells = tuple(types.CellType(_real(cell.cell_contents)) for cell in function.__closure__ or ())
    return copied(function, function.__name__, {**values, **named}, cells)


def _real(value: Any) -> Any:
    while isinstance(value, Deferred):
        value = value.real
    return value


@functools.cache
def _helpers(module: str) -> dict[str, Any]:
    """Return the names that a module imports in its block `if COMPILING`."""
    values: dict[str, Any] = {}
    path = getattr(sys.modules.get(module), "__file__", None)
    if path is not None:
        for node in ast.parse(Path(path).read_bytes()).body:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "COMPILING":
                exec(compile(ast.Module(node.body, []), path, "exec"), values)
    return values


def numba_njit(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    """Return numba's dispatcher of a function."""
    import numba

    tell_numba()
    return numba.njit(nogil=True, **options)(resolved(function))


def tell_numba() -> None:
    """Have numba compile for all features of this CPU, unless the user has said what it is to compile for."""
    if not {"NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"} & os.environ.keys():
        from numba.core import config

        if (features := host_features()) != binding.get_host_cpu_features().flatten():
            config.CPU_FEATURES = features
