"""gguf-info: what is in a GGUF file, and the memory it will need."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from gguf_run.formats.errors import OptionError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.cli import complete
from gguf_run.runtime.cli.byte_size import byte_size
from gguf_run.runtime.cli.common import tool
from gguf_run.runtime.cli.info_report import change_lines, diff_lines, file_lines, fit_lines, ops_lines
from gguf_run.runtime.cli.options import CACHE_OPTIONS, CTX_SIZE, PATH, PLACEMENT_OPTIONS, to_load_options
from gguf_run.runtime.hub.find import find_model
from gguf_run.runtime.info.contents import adapter_facts, file_facts, listed_tensors, memory_facts, ops_facts
from gguf_run.runtime.info.diff import compare
from gguf_run.runtime.info.edit import edit
from gguf_run.runtime.load.options import LoadOptions, Wanted
from gguf_run.runtime.terminal.json_text import json_text
from gguf_run.runtime.terminal.progress import Progress

EDITS, SHOWS = ("assignments", "remove"), ("tensors", "stats", "diff")  # parameters that exclude each other
Answer = tuple[Mapping[str, Any], Iterator[str]]  # facts for --json, and the same as lines


@tool(
    "gguf-info",
    params=[CTX_SIZE, *CACHE_OPTIONS, *PLACEMENT_OPTIONS],
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
@click.option("--fit", is_flag=True, help="Show what fits this machine, and how fast: each MODEL, or usual sizes.")
@click.option("--tensors", is_flag=True, help="Also list the tensors.")
@click.option("--ops", is_flag=True, help="Show the ops of a token instead: bytes read and operations of each.")
@click.option("--stats", is_flag=True, help="Also show statistics of the weights of each tensor.")
@click.option(
    "--diff", metavar="OTHER", shell_complete=complete.models, help="Show how another file differs from MODEL."
)
@click.option("--match", metavar="REGEX", default=".*", help="Only tensors in whose names REGEX is found.")
@click.option("--set", "assignments", metavar="KEY=VALUE", multiple=True, help="Change a metadata key; see above.")
@click.option("--remove", metavar="KEY", multiple=True, help="Remove a metadata key.")
@click.option("--output", "-o", type=PATH, help="File to write the changed model to.")
@click.option("--in-place", is_flag=True, help="Change the file itself. Its header must keep its size.")
@click.option("--gpu-memory", metavar="N(M|G),...", help="Show what goes on GPUs with these bytes of free memory.")
def main(models: Sequence[str], as_json: bool, fit: bool, **given: Any) -> None:
    """Show what is in a GGUF file: metadata, sizes per tensor type, parameters, and the memory it will need.

    MODEL is a GGUF file (of a split model the first), hf:owner/repo[:Q4_K_M], or the folder of a Hugging Face
    checkpoint: what it is while it runs. A long array is cut.

    --set and --remove change metadata, in a copy (-o) or in place. The value of a known key keeps its type. The type of
    a new key follows from the value, or is given: KEY:TYPE=VALUE with a type such as u32, f32, string, array[i32].
    Arrays are written as in JSON.
    """
    if fit:
        facts, lines = _fit(models)
    elif len(models) == 1:
        facts, lines = _one(models[0], given)
    else:
        raise click.UsageError(f"{len(models)} MODELs are given, must be one.")
    for line in [json_text(facts)] if as_json else lines:
        click.echo(line)


def _fit(models: Sequence[str]) -> Answer:
    """Return whether models fit this machine, and how fast they are: the files, or else usual sizes of models."""
    from gguf_run.runtime.info.fit import USUAL_MODELS, Machine, fit_file, fit_usual

    context = click.get_current_context()
    for option in context.command.params:
        is_given = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if is_given and option.name not in ("models", "as_json", "fit"):
            raise click.UsageError(f"--fit goes without {option.opts[0]}: it takes MODELs and --json only.")
    paths = [find_model(model) for model in models]
    with ExitStack() as files:
        opened = [files.enter_context(GGUFFile.open(path)) for path in paths]
        machine = Machine.measure()
        found = [fit_file(file, machine) for file in opened] or [fit_usual(model, machine) for model in USUAL_MODELS]
    measured = machine.facts()
    return {"machine": measured, "models": found}, fit_lines(measured, found)


def _one(model: str, given: Mapping[str, Any]) -> Answer:
    """Return what is in a file, what differs in another file, or what was changed."""
    is_edit, pattern, (options, gpus) = _is_edit(given), _pattern(given["match"]), _loading(given)
    with _opened(model) as file:
        if is_edit:
            if file.path.is_dir():
                raise OptionError(f"{model}: is a folder, only metadata of a file can be changed: see gguf-convert")
            with Progress("writing") as progress:
                changes = edit(file, given["assignments"], given["remove"], given["output"], progress.set)
            return {"metadata": changes}, change_lines(changes)
        if given["diff"]:
            with _opened(given["diff"]) as other, Progress("comparing") as progress:
                facts = compare(file, other, pattern, progress.set)
            return facts, diff_lines(facts)
        if given["ops"]:
            facts = ops_facts(file, options)
            return facts, ops_lines(facts)
        is_adapter = "adapter.type" in file.metadata
        more = {"adapter": adapter_facts(file)} if is_adapter else {"memory": memory_facts(file, options, gpus)}
        facts = file_facts(file) | more
        if given["tensors"] or given["stats"]:
            shown = [tensor for tensor in file.tensors.values() if pattern.search(tensor.name)]
            with Progress("reading") as progress:
                facts["tensors"] = listed_tensors(shown, given["stats"], progress.set)
        with_caches = options.n_ctx or options.cache_type or options.cache_rotation or options.cache_scales
        return facts, file_lines(facts, bool(with_caches))


def _opened(model: str) -> GGUFFile:
    """Return a file, or the folder of a checkpoint as it runs."""
    if not Path(model).is_dir():
        return GGUFFile.open(find_model(model))
    from gguf_run.runtime.load.open_model import open_model  # late: the converter is large

    return open_model(Path(model))


def _is_edit(given: Mapping[str, Any]) -> bool:
    """Whether metadata is to be changed. UsageError for options that do not go together."""
    is_edit, shows = (any(given[name] for name in names) for names in (EDITS, SHOWS))
    if is_edit != bool(given["output"] or given["in_place"]) or (given["output"] and given["in_place"]):
        raise click.UsageError("--set and --remove need either -o OUT or --in-place, and these need one of them.")
    if is_edit and shows:
        raise click.UsageError("--set and --remove go without --tensors, --stats and --diff.")
    if given["ops"] and (is_edit or shows):
        raise click.UsageError("--ops goes without --set, --remove, --tensors, --stats and --diff.")
    return is_edit


def _loading(given: Mapping[str, Any]) -> tuple[LoadOptions, list[int]]:
    """Return the options of loading the model, and the free bytes of each GPU."""
    memory = given["gpu_memory"]
    gpus = [byte_size(part, "--gpu-memory") for part in memory.split(",")] if memory else []
    options = to_load_options(given, device=",".join(f"cuda:{i}" for i in range(len(gpus))) or "auto")
    if options.wanted != Wanted() and not gpus:
        raise click.UsageError("--gpu-layers, --tensor-split, --cpu-moe and --n-cpu-moe need --gpu-memory.")
    return options, gpus


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, RecursionError) as error:
        raise OptionError(f"--match {text}: is not a regular expression: {error}") from None
