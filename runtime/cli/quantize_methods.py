"""--method, --search and --keep-lattice of gguf-quantize: other roundings than ggml's."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import click

from gguf_run.formats.errors import OptionError
from gguf_run.formats.gguf.imatrix import Imatrix
from gguf_run.formats.gguf.moments import Moments
from gguf_run.runtime.load.machine import available_memory
from gguf_run.runtime.quantize.fold import awq
from gguf_run.runtime.quantize.gptq import GptqOptions, with_gptq
from gguf_run.runtime.quantize.lattice import with_lattice
from gguf_run.runtime.quantize.plan import Plan, with_search
from gguf_run.runtime.terminal.progress import progress


def with_methods(plan: Plan, n_threads: int, given: Mapping[str, Any]) -> Plan:
    """Return the plan with the changes of weights and the roundings that the options name."""
    methods = dict(_method(text) for text in given["method"])
    if "awq" in methods and given["keep_lattice"]:
        raise click.UsageError("--method awq moves weights off their lattice: give it or --keep-lattice, not both")
    path = given["imatrix"]
    is_full = path is not None and bool(Imatrix.open(path).inputs)
    if "gptq" in methods and not is_full:
        raise OptionError("--method gptq: needs --imatrix FILE with second moments, from gguf-imatrix --full")
    if methods:
        plan = replace(plan, metadata={**plan.metadata, "quantize.method": " ".join(given["method"])})
    plan = with_search(plan) if given["search"] else plan
    if "awq" in methods:
        with Moments.open(path) if is_full else nullcontext() as moments, progress("scaling channels") as bar:
            plan = awq(plan, moments, n_threads, bar.set)
    if "gptq" in methods:
        plan = with_gptq(plan, Moments.open(path), methods["gptq"], available_memory())
    return with_lattice(plan) if given["keep_lattice"] else plan


def _method(text: str) -> tuple[str, GptqOptions]:
    """Return the name and the options of a --method, as gptq:rho=0.3,sweeps=0."""
    name, _, rest = text.partition(":")
    kinds: dict[str, type] = {field.name: type(field.default) for field in fields(GptqOptions)}
    try:
        if name not in ("awq", "gptq") or (rest and name == "awq"):
            raise ValueError
        pairs = dict(pair.split("=", 1) for pair in rest.split(",")) if rest else {}
        options = GptqOptions(**{key: kinds[key](value) for key, value in pairs.items()})
        if not (0 <= options.rho <= 1 and options.sweeps >= 0):
            raise ValueError
        return name, options
    except (ValueError, KeyError):
        raise OptionError(
            f"--method {text}: allowed are awq, gptq and gptq:NAME=NUMBER,... of {', '.join(kinds)}; rho is 0 to 1"
        ) from None
