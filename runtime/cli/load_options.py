"""The options of the KV cache, which several commands share."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from gguf_run.formats.errors import OptionError

F = TypeVar("F", bound=Callable[..., Any])

_SCALES = "A calibration file (gguf-eval kv-scales): scales of fp8, types of each layer."
ROTATION: tuple[tuple[str, ...], dict[str, Any]] = (
    ("--cache-rotation/--no-cache-rotation",),
    {
        "default": None,
        "help": "Rotate what is stored by a Hadamard transform: more exact.  [default: types of 8 bits or less]",
    },
)
_ROWS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (
        ("--cache-type", "-ct"),
        {"metavar": "TYPE", "help": "Type of the KV cache: f16, q8_0, int8, q4_0, ...  [default: f16]"},
    ),
    (("--cache-type-k", "-ctk"), {"metavar": "TYPE", "help": "Type of the keys alone."}),
    (("--cache-type-v", "-ctv"), {"metavar": "TYPE", "help": "Type of the values alone."}),
    ROTATION,
    (("--cache-scales",), {"metavar": "FILE", "help": _SCALES}),
)
NAMES = ("cache_type", "cache_type_k", "cache_type_v", "cache_rotation", "cache_scales")
CACHE_OPTIONS = tuple(click.Option(list(names), **row) for names, row in _ROWS)


def cache_options(function: F) -> F:
    """Add the options to a command; it gets them as NAMES."""
    for names, row in reversed(_ROWS):
        function = click.option(*names, **row)(function)
    return function


def load_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what Model.load calls a command's options of NAMES."""
    both, k, v, rotation, scales = (options[name] for name in NAMES)
    if both is not None and (k or v):
        raise OptionError(f"--cache-type {both} sets K and V: leave out --cache-type-k and --cache-type-v")
    kinds = both if k is None and v is None else (k or "f16", v or "f16")
    return {"cache_type": kinds, "cache_rotation": rotation, "cache_scales": scales}
