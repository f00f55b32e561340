"""Puts the real things in the place of Deferreds before numba reads a function. deferred.py draws it."""

import ast
import functools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf_run.formats.compiler.deferred import Deferred, copied


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
