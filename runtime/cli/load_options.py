"""The options of loading a model, which several commands share, and LoadOptions made from them."""

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguf_run.formats.errors import OptionError
from gguf_run.runtime.cli import complete
from gguf_run.runtime.load.options import LoadOptions

if TYPE_CHECKING:
    from gguf_run.runtime.model import Model

PATH = click.Path(path_type=Path)
THREADS = click.Option(["--threads", "-t"], type=int, help="Threads that compute.  [default: physical cores]")
CTX_SIZE = click.Option(
    ["--ctx-size", "-c", "n_ctx"], type=int, help="Positions of the context.  [default: the model's, at most 4096]"
)
ROTATION = click.Option(
    ["--cache-rotation/--no-cache-rotation"],
    default=None,
    help="Rotate keys and values by a Hadamard transform: more exact.  [default: types of 8 bits or less]",
)
CACHE_OPTIONS = [
    click.Option(
        ["--cache-type", "-ct"],
        metavar="TYPE",
        shell_complete=complete.cache_types,
        help="Type of the KV cache: f16, q8_0, int8, q4_0, ...  [default: f16]",
    ),
    click.Option(
        ["--cache-type-k", "-ctk"],
        metavar="TYPE",
        shell_complete=complete.cache_types,
        help="Type of the keys alone.",
    ),
    click.Option(
        ["--cache-type-v", "-ctv"],
        metavar="TYPE",
        shell_complete=complete.cache_types,
        help="Type of the values alone.",
    ),
    ROTATION,
    click.Option(
        ["--cache-scales"],
        metavar="FILE",
        shell_complete=complete.files,
        help="A calibration file (gguf-eval kv-scales): scales of fp8, types of each layer.",
    ),
]
GPU_LAYERS = click.Option(
    ["--gpu-layers", "-ngl"],
    metavar="N|auto|all",
    shell_complete=complete.words("auto all"),
    help="Layers on the GPU, from the last one on.  [default: auto, as many as fit]",
)
TENSOR_SPLIT = click.Option(
    ["--tensor-split", "-ts"],
    metavar="N,N",
    help="Parts of these for each of several GPUs: 3,1  [default: by free memory]",
)
EXPERT_OPTIONS = [
    click.Option(["--cpu-moe", "-cmoe"], is_flag=True, help="Keep the experts of all layers on the CPU."),
    click.Option(
        ["--n-cpu-moe", "-ncmoe"],
        type=int,
        metavar="N",
        help="Keep the experts of the first N layers on the CPU.  [default: as few as it takes]",
    ),
]
DEVICE_OPTIONS = [
    THREADS,
    click.Option(
        ["--device", "-dev"],
        default="auto",
        show_default=True,
        shell_complete=complete.words("auto cpu cuda cuda:0"),
        help="cpu, cuda, cuda:1, cuda:0,cuda:1, or auto.",
    ),
    GPU_LAYERS,
    TENSOR_SPLIT,
    *EXPERT_OPTIONS,
]
RUNTIME_OPTIONS = [*DEVICE_OPTIONS, *CACHE_OPTIONS]  # all that may differ between two runs of one model
_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}
_FIELDS = {field.name for field in fields(LoadOptions)}


def byte_size(text: str | None, option: str = "--split-max-size") -> int:
    """Return the bytes that an option such as "500M" or "2G" means; None means 0."""
    if not text:
        return 0
    match = re.fullmatch(r"([1-9]\d{0,9})([KMG]?)", text.upper())
    if not match:
        raise OptionError(f"{option} {text}: must be a number of bytes, as 500M or 2G")
    return int(match[1]) * _UNITS.get(match[2], 1)


def to_load_options(values: Mapping[str, Any], **more: Any) -> LoadOptions:
    """Make LoadOptions of a command's parameters, those of other names left out. more: fields that come before them.

    OptionError for values that are not allowed, or not together.
    """
    found = {name: value for name, value in values.items() if name in _FIELDS} | {"n_threads": values.get("threads")}
    if {"cache_type_k", "cache_type_v"} & {*values}:
        found["cache_type"] = _cache_type(*(values[f"cache_type{suffix}"] for suffix in ("", "_k", "_v")))
    return LoadOptions(**(found | more))


def _cache_type(both: str | None, k: str | None, v: str | None) -> str | tuple[str, str] | None:
    if both is not None and (k or v):
        raise OptionError(f"--cache-type {both} sets K and V: leave out --cache-type-k and --cache-type-v")
    return both if k is None and v is None else (k or "f16", v or "f16")


def load_model(path: str | None, options: LoadOptions) -> "Model":
    """Load a model; a bar on stderr shows how far it is, and lines say what runs where if GPUs are used."""
    from gguf_run.runtime.model import Model
    from gguf_run.runtime.terminal.progress import progress

    with progress("loading") as bar:
        return Model.load(path, options, progress=bar.set, report=bar.message)
