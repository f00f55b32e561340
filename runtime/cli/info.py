"""gguf-info: what is in a GGUF file, and the memory it will need."""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.formats.gguf.reader import GGUFFile, Tensor
from gguf_run.runtime.cli import complete
from gguf_run.runtime.cli.common import tool
from gguf_run.runtime.cli.load_options import CACHE_OPTIONS, EXPERT_OPTIONS, byte_size, to_load_options
from gguf_run.runtime.hub.find import find_model
from gguf_run.runtime.info.diff import change_lines, compare, diff_lines
from gguf_run.runtime.info.edit import edit
from gguf_run.runtime.info.memory import memory_facts, memory_lines
from gguf_run.runtime.info.tensors import Statistics, statistics
from gguf_run.runtime.info.values import describe_value, show_value
from gguf_run.runtime.load.options import LoadOptions, Wanted
from gguf_run.runtime.terminal.progress import Progress
from gguf_run.runtime.terminal.text import one_line, size_text, table

STATISTICS = tuple(column.name for column in fields(Statistics))


@tool(
    "gguf-info",
    params=[*CACHE_OPTIONS, *EXPERT_OPTIONS],
    examples=(
        "gguf-info model.gguf -c 32768",
        "gguf-info --fit model.gguf",
        "gguf-info model.gguf --tensors --match 'blk.0' --stats",
        "gguf-info f16.gguf --diff q4.gguf --json",
        "gguf-info model.gguf --set general.name='My model' -o new.gguf",
    ),
)
@click.argument("models", metavar="[MODEL...]", nargs=-1, shell_complete=complete.models)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--fit", is_flag=True, help="Show what fits this machine, and how fast: of MODELs, or of usual sizes.")
@click.option("--tensors", is_flag=True, help="List the tensors as well.")
@click.option("--stats", is_flag=True, help="Show statistics of the tensors' weights as well.")
@click.option(
    "--diff",
    metavar="OTHER",
    shell_complete=complete.models,
    help="Show what differs in another file: metadata, tensors, error of each.",
)
@click.option(
    "--match",
    metavar="REGEX",
    default="",
    show_default=False,
    help="Only tensors whose name holds a match.  [default: all]",
)
@click.option("--set", "assignments", metavar="KEY=VALUE", multiple=True, help="Change a metadata key; see above.")
@click.option("--remove", metavar="KEY", multiple=True, help="Remove a metadata key.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="File to write the changed model to.")
@click.option("--in-place", is_flag=True, help="Change the file itself, if its size stays the same.")
@click.option(
    "--ctx-size",
    "-c",
    type=click.IntRange(1, 2**31 - 1),
    help="Positions of the context, for the memory needed.  [default: the model's, at most 4096]",
)
@click.option(
    "--gpu-memory", metavar="N(M|G),...", help="Show what goes on a GPU, or several, with so much free memory."
)
@click.option("--gpu-layers", "-ngl", default="auto", show_default=True, metavar="N|auto|all", help="Layers on them.")
@click.option("--tensor-split", "-ts", metavar="N,N", help="Parts of these for each.  [default: by free memory]")
def main(
    models: Sequence[str],
    as_json: bool,
    fit: bool,
    tensors: bool,
    stats: bool,
    diff: str | None,
    match: str,
    assignments: Sequence[str],
    remove: Sequence[str],
    output: Path | None,
    in_place: bool,
    ctx_size: int | None,
    gpu_memory: str | None,
    gpu_layers: str,
    tensor_split: str | None,
    cpu_moe: bool,
    n_cpu_moe: int | None,
    **cache: Any,
) -> None:
    """Show what is in a GGUF file: metadata, sizes per tensor type, parameters, and the memory it will need.

    MODEL is a GGUF file (of a split model the first) or hf:owner/repo[:Q4_K_M]. Of long arrays the beginning is shown.

    --set and --remove change metadata, in a copy (-o) or in place. A value has the type that its key has; that of a new
    key follows from the value, or is given: KEY:TYPE=VALUE with a type such as u32, f32, bool, string, array[i32].
    Arrays are written as in JSON.
    """
    if sys.stdout is None:
        raise GgufRunError("stdout is closed: there is nowhere to write to")
    if fit:
        context = click.get_current_context()
        for option in context.command.params:
            is_given = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
            if is_given and option.name not in ("models", "as_json", "fit"):
                raise click.UsageError(f"--fit goes without {option.opts[0]}: it takes MODELs and --json only.")
        return _fit(models, as_json)
    if len(models) != 1:
        raise click.UsageError(f"{len(models)} MODELs are given, must be one.")
    editing = bool(assignments or remove)
    if editing != bool(output or in_place) or (output and in_place):
        raise click.UsageError("--set and --remove need either -o OUT or --in-place, and these need one of them.")
    if editing and (tensors or stats or diff):
        raise click.UsageError("--set and --remove go without --tensors, --stats and --diff.")
    pattern, options = _pattern(match), to_load_options(cache)
    gpus = [byte_size(part, "--gpu-memory") for part in gpu_memory.split(",")] if gpu_memory else []
    device = ",".join(f"cuda:{i}" for i in range(len(gpus))) or "auto"
    wanted = LoadOptions(
        device=device, gpu_layers=gpu_layers, tensor_split=tensor_split, cpu_moe=cpu_moe, n_cpu_moe=n_cpu_moe
    ).wanted
    if wanted != Wanted() and not gpus:
        raise click.UsageError("--gpu-layers, --tensor-split, --cpu-moe and --n-cpu-moe need --gpu-memory.")
    with ExitStack() as files:
        file = files.enter_context(GGUFFile.open(find_model(models[0])))
        if editing:
            facts = {"metadata": edit(file, assignments, remove, output)}
            lines = change_lines(facts["metadata"])
        elif diff:
            other = files.enter_context(GGUFFile.open(find_model(diff)))
            facts = compare(file, other, pattern)
            lines = diff_lines(facts)
        else:
            memory = memory_facts(file, ctx_size, options, wanted if gpus else None, gpus)
            facts = describe(file, pattern if tensors or stats else None, stats, memory)
            lines = _lines(facts, bool(ctx_size or any(cache.values())))
    _print(facts, lines, as_json)


def _print(facts: Mapping[str, Any], lines: Iterable[str], as_json: bool) -> None:
    for line in [json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False)] if as_json else lines:
        click.echo(line)


def _fit(models: Sequence[str], as_json: bool) -> None:
    from gguf_run.runtime.info.fit import SHAPES, Machine, fit_file, fit_lines, fit_shape

    paths = [find_model(model) for model in models]
    with ExitStack() as files:
        opened = [files.enter_context(GGUFFile.open(path)) for path in paths]
        machine = Machine.measure()
        found = [fit_file(file, machine) for file in opened] or [fit_shape(shape, machine) for shape in SHAPES]
    measured = machine.facts()
    _print({"machine": measured, "models": found}, fit_lines(measured, found), as_json)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, RecursionError) as error:
        raise OptionError(f"--match {text}: is not a regular expression: {error}") from None


def describe(file: GGUFFile, tensors: re.Pattern[str] | None, stats: bool, memory: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that gguf-info shows, as JSON has it. Sizes are in bytes.

    tensors: those to list, stats: with statistics; memory: the memory needed.
    """
    all_tensors = list(file.tensors.values())
    facts: dict[str, Any] = {
        "path": str(file.path),
        "n_parts": file.n_parts,
        "version": file.version,
        "byte_order": {"<": "little", ">": "big"}[file.byte_order],
        "alignment": file.alignment,
        "nbytes": file.nbytes,
        "metadata": {
            key: {"type": file.metadata.type_name(key)} | describe_value(value) for key, value in file.metadata.items()
        },
        "total": _sum(all_tensors),
        "types": _per_type(all_tensors),
        "memory": memory,
    }
    if tensors:
        shown = [t for t in all_tensors if tensors.search(t.name)]
        with Progress("reading") as progress:
            facts["tensors"] = []
            for t in shown:
                facts["tensors"].append({"name": t.name, "type": t.type.name, "ne": list(t.ne), "nbytes": t.nbytes})
                if stats:
                    facts["tensors"][-1] |= asdict(statistics(t))
                    progress.set(sum(entry["nbytes"] for entry in facts["tensors"]), sum(t.nbytes for t in shown))
    return facts


def _sum(tensors: Sequence[Tensor]) -> dict[str, Any]:
    n_elements, nbytes = sum(t.n_elements for t in tensors), sum(t.nbytes for t in tensors)
    bits = round(8 * nbytes / n_elements, 3) if n_elements else None
    return {"n_tensors": len(tensors), "n_parameters": n_elements, "nbytes": nbytes, "bits_per_weight": bits}


def _per_type(tensors: Sequence[Tensor]) -> list[dict[str, Any]]:
    """One entry for each tensor type, the largest first."""
    groups: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.type.name, []).append(tensor)
    rows = [{"type": name} | _sum(group) for name, group in groups.items()]
    return sorted(rows, key=lambda row: row["nbytes"], reverse=True)


def _lines(facts: Mapping[str, Any], cache_table: bool) -> Iterator[str]:
    """The facts for people."""
    parts = f" in {facts['n_parts']} files" if facts["n_parts"] > 1 else ""
    yield (
        f"{one_line(facts['path'])}: GGUF version {facts['version']}, {facts['byte_order']}-endian, "
        f"{size_text(facts['nbytes'])}{parts}"
    )
    yield ""
    yield from table(
        [f"metadata ({len(facts['metadata'])})", "type", "value"],
        [[one_line(key), entry["type"], show_value(entry)] for key, entry in facts["metadata"].items()],
        "lll",
    )
    yield ""
    yield from table(
        ["tensor type", "tensors", "parameters", "size", "bits/weight"],
        [[row.get("type", "all"), *_numbers(row)] for row in [*facts["types"], facts["total"]]],
        "lrrrr",
    )
    yield ""
    yield from memory_lines(facts["memory"], cache_table)
    if "tensors" in facts:
        stats = STATISTICS if any("rms" in t for t in facts["tensors"]) else ()
        yield ""
        yield from table(
            [
                f"tensor ({len(facts['tensors'])})",
                "type",
                "ne",
                "size",
                *(name.removeprefix("n_").replace("_", " ") for name in stats),
            ],
            [
                [one_line(t["name"]), t["type"], " x ".join(map(str, t["ne"])), size_text(t["nbytes"])]
                + ["-" if t[name] is None else f"{t[name]:.4g}" for name in stats]
                for t in facts["tensors"]
            ],
            "lllr" + "r" * len(stats),
        )


def _numbers(row: Mapping[str, Any]) -> list[str]:
    bits = row["bits_per_weight"]
    size = size_text(row["nbytes"])
    return [str(row["n_tensors"]), f"{row['n_parameters']:,}", size, "-" if bits is None else f"{bits:.2f}"]
