"""The options that say what runs where, which several commands share."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_ROWS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (
        ("--device", "-dev"),
        {"default": "auto", "show_default": True, "help": "cpu, cuda, cuda:1, cuda:0,cuda:1, or auto."},
    ),
    (
        ("--gpu-layers", "-ngl"),
        {"metavar": "N|auto|all", "help": "Layers on the GPU, from the last one on.  [default: auto, as many as fit]"},
    ),
    (
        ("--tensor-split", "-ts"),
        {"metavar": "N,N", "help": "Parts of these for each of several GPUs: 3,1  [default: by free memory]"},
    ),
    (("--cpu-moe", "-cmoe"), {"is_flag": True, "help": "Keep the experts of all layers on the CPU."}),
    (
        ("--n-cpu-moe", "-ncmoe"),
        {"type": int, "metavar": "N", "help": "Or of the first N layers.  [default: as few as it takes]"},
    ),
)
NAMES = ("device", "gpu_layers", "tensor_split", "cpu_moe", "n_cpu_moe")  # as Model.load calls them
DEVICE_OPTIONS = tuple(click.Option(list(names), **row) for names, row in _ROWS)


def device_options(function: F, first: int = 0) -> F:
    """Add the options, from number `first` on, to a command; it gets them as NAMES."""
    for names, row in reversed(_ROWS[first:]):
        function = click.option(*names, **row)(function)
    return function


def expert_options(function: F) -> F:
    """As device_options, only what says where experts are."""
    return device_options(function, NAMES.index("cpu_moe"))


def placement_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what Model.load takes of a command's options."""
    return {name: options[name] for name in NAMES}
