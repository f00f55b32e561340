"""The options of loading a model, which several commands share, and LoadOptions made from them."""

import re
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguf_run.formats.errors import OptionError
from gguf_run.runtime.cli import complete
from gguf_run.runtime.load.options import LoadOptions

if TYPE_CHECKING:
    from gguf_run.runtime.model import Model

PATH = click.Path(path_type=Path)


def option(flags: str, text: str, **settings: Any) -> click.Option:
    """Make an option. flags: as "--ctx-size -c n_ctx"; the last word without dashes names the parameter."""
    return click.Option(flags.split(), help=text, **settings)


THREADS = option("--threads -t", "Threads that compute.  [default: physical cores]", type=int)
CTX_SIZE = option("--ctx-size -c n_ctx", "Positions of the context.  [default: the model's, at most 4096]", type=int)
_cache_type_option = partial(option, metavar="TYPE", shell_complete=complete.cache_types)
ROTATION = option(
    "--cache-rotation/--no-cache-rotation",
    "Rotate keys and values by a Hadamard transform: more exact.  [default: types of 8 bits or less]",
    default=None,
)
CACHE_OPTIONS = [
    _cache_type_option("--cache-type -ct", "Type of the KV cache: f16, q8_0, int8, q4_0, ...  [default: f16]"),
    _cache_type_option("--cache-type-k -ctk", "Type of the keys alone."),
    _cache_type_option("--cache-type-v -ctv", "Type of the values alone."),
    ROTATION,
    option(
        "--cache-scales",
        "A calibration file (gguf-eval kv-scales): scales of fp8, types of each layer.",
        metavar="FILE",
        shell_complete=complete.files,
    ),
]
PLACEMENT_OPTIONS = [
    option(
        "--gpu-layers -ngl",
        "So many of the last layers run on the GPU.  [default: auto, as many as fit]",
        metavar="N|auto|all",
        shell_complete=complete.words("auto all"),
    ),
    option("--tensor-split -ts", "How several GPUs share these layers: 3,1  [default: by free memory]", metavar="N,N"),
    option("--cpu-moe -cmoe", "Keep the experts of all layers on the CPU.", is_flag=True),
    option(
        "--n-cpu-moe -ncmoe",
        "Keep the experts of the first N layers on the CPU.  [default: as few as possible]",
        type=int,
        metavar="N",
    ),
]
DEVICE_OPTIONS = [
    THREADS,
    option(
        "--device -dev",
        "Where the model runs: cpu, cuda, cuda:1, cuda:0,cuda:1, or auto.",
        default="auto",
        show_default=True,
        shell_complete=complete.words("auto cpu cuda cuda:0"),
    ),
    *PLACEMENT_OPTIONS,
]
RUNTIME_OPTIONS = [*DEVICE_OPTIONS, *CACHE_OPTIONS]  # all that may differ between two runs of one model
_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}
_FIELDS = {field.name for field in fields(LoadOptions)}


def byte_size(text: str | None, option: str = "--split-max-size") -> int:
    """Return the bytes that an option such as "500M" or "2G" means; None means 0."""
    if not text:
        return 0
    match = re.fullmatch(r"([1-9]\d{0,9})([KMG]?)", text.upper())
    if match is None:
        raise OptionError(f"{option} {text}: must be a number of bytes, as 500M or 2G")
    return int(match[1]) * _UNITS.get(match[2], 1)


def to_load_options(values: Mapping[str, Any], **more: Any) -> LoadOptions:
    """Make LoadOptions of a command's parameters.

    values: by name; names that are no options of loading are ignored. more: fields of LoadOptions that replace them.
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
    """Load a model. stderr shows a progress bar, and lines that say what runs where if a GPU is used."""
    from gguf_run.runtime.model import Model
    from gguf_run.runtime.terminal.progress import progress

    with progress("loading") as bar:
        return Model.load(path, options, progress=bar.set, report=bar.message)
