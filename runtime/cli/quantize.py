"""gguf-quantize: a model's weights in fewer bits."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguf_run.formats.errors import OptionError, did_you_mean
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.cli import complete
from gguf_run.runtime.cli.byte_size import byte_size
from gguf_run.runtime.cli.common import tool
from gguf_run.runtime.cli.options import PATH
from gguf_run.runtime.cli.quantize_report import OPTIONS, run_plan, show_types
from gguf_run.runtime.hub.find import find_model
from gguf_run.runtime.load.machine import default_threads
from gguf_run.runtime.quantize.file_types import WRITABLE, file_type, writable_type
from gguf_run.runtime.quantize.recipe import read_recipe, rule, write_recipe
from gguf_run.runtime.quantize.rules import Overrides
from gguf_run.runtime.terminal.text import message

if TYPE_CHECKING:
    from gguf_run.runtime.quantize.plan import Options

TEXT = click.Path(exists=True, dir_okay=False, path_type=Path)
_TYPES = complete.among(lambda typed: WRITABLE)
_KV_TYPES: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": {"true": True, "false": False}.__getitem__}


@tool(
    "gguf-quantize",
    params=OPTIONS,
    examples=(
        "gguf-quantize f16.gguf q4.gguf Q4_K_M",
        "gguf-quantize f16.gguf q3.gguf Q3_K_M --imatrix imatrix.gguf",
        "gguf-quantize f16.gguf Q5_K_S --dry-run",
        "gguf-quantize f16.gguf out.gguf Q4_K_M --tensor-type ffn_down=Q6_K",
        "gguf-quantize f16.gguf out.gguf --target-size 800M --probe calibration.txt",
    ),
)
@click.argument("model", metavar="IN", shell_complete=complete.models)
@click.argument("rest", metavar="OUT [TYPE]", nargs=-1, shell_complete=complete.file_types)
@click.option(
    "--include-weights", multiple=True, metavar="TEXT", help="Use only imatrix entries whose names hold TEXT."
)
@click.option("--exclude-weights", multiple=True, metavar="TEXT", help="Use no imatrix entries whose names hold TEXT.")
@click.option("--pure", is_flag=True, help="One type for all matrices, no mixture.")
@click.option("--tensor-type", multiple=True, metavar="REGEX=TYPE", help="Type of the tensors whose name matches.")
@click.option("--recipe", type=PATH, help="A file of such words: types that --save-recipe wrote, or llama-quantize's.")
@click.option("--save-recipe", type=PATH, help="Write the types of all quantized tensors to this file.")
@click.option("--target-size", metavar="N(K|M|G)", help="Choose the types that are best in a file of this size.")
@click.option("--target-bpw", type=click.FloatRange(0, 32, min_open=True), help="The same, in bits per weight.")
@click.option("--probe", type=PATH, help="A text, on which the choice measures what each tensor costs: takes minutes.")
@click.option("--sensitivity", type=PATH, help="The file that keeps what --probe has measured, for other sizes.")
@click.option("--output-tensor-type", metavar="TYPE", shell_complete=_TYPES, help="Type of the output matrix.")
@click.option("--token-embedding-type", metavar="TYPE", shell_complete=_TYPES, help="Type of the embeddings.")
@click.option("--leave-output-tensor", is_flag=True, help="Keep output.weight as it is.")
@click.option("--allow-requantize", is_flag=True, help="Quantize quantized tensors again: this costs quality.")
@click.option("--override-kv", multiple=True, metavar="KEY=TYPE:VALUE", help="Set metadata; int, float, bool or str.")
@click.option("--prune-layers", metavar="L,...", help="Leave these layers out and renumber the others.")
@click.option("--keep-split", is_flag=True, help="Split the output into the same files as the input.")
@click.option("--method", multiple=True, metavar="NAME", help="Round with calibration: gptq, awq or both, see docs.")
@click.option("--search", is_flag=True, help="Better scales for MXFP4 and NVFP4 than llama.cpp's: other bytes.")
@click.option("--keep-lattice", is_flag=True, help="Keep the codes of weights that were trained for Q4_0 or its like.")
@click.option("--split-max-tensors", type=click.IntRange(1), help="Put at most so many tensors into one file.")
@click.option("--evaluate", type=TEXT, metavar="TEXT", help="Then compare OUT with IN on 20 chunks of this text.")
def main(**given: Any) -> None:
    """Write the model IN to OUT with weights of TYPE, such as Q4_K_M or Q8_0. The bytes are those of llama-quantize.

    IN is a GGUF file (of a split model the first) or hf:owner/repo:F16, in F16, BF16 or F32. TYPE is the name or number
    of a file type of llama-quantize. A mixture such as Q4_K_M gives more bits to the sensitive tensors. COPY changes no
    tensor. In place of TYPE, --target-size chooses a type for each tensor. With --dry-run OUT may be left out.
    """
    for line in _run(message, **given):
        click.echo(line)


def quantize_model(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    type: str | None = None,
    *,
    report: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> None:
    """Write the model to `out` with weights of a type, as the command gguf-quantize does.

    options: those of the command, as imatrix="m.gguf", tensor_type=["ffn_down=Q6_K"], allow_requantize=True.
    report: is called with each line that the command prints.
    Errors are those of the command; OptionError for options that it does not have or allow.
    """
    several = {str(param.name): param.multiple for param in main.params if isinstance(param, click.Option)}
    for name in options.keys() - several:
        raise OptionError(f"{name} is no option of gguf-quantize: {did_you_mean(name, several)}see its --help")
    defaults = {name: [value] if several[name] and isinstance(value, str) else value for name, value in options.items()}
    words = ["--", os.fspath(model), os.fspath(out), *([type] if type else [])]
    try:
        for line in _run(report, **main.make_context("gguf-quantize", words, default_map=defaults).params):
            report(line)
    except click.UsageError as error:
        raise OptionError(error.format_message()) from None


def _run(
    report: Callable[[str], None], model: str, rest: tuple[str, ...], dry_run: bool, threads: int | None, **given: Any
) -> Iterator[str]:
    """Run the command; yield the lines of its result. report: is called with notes."""
    has_target = given["target_size"] or given["target_bpw"]
    n_names = 1 if has_target else 2
    if len(rest) not in (n_names, n_names - dry_run):
        raise click.UsageError("give IN, OUT and TYPE or a --target-... (with --dry-run OUT may be left out)")
    if given["target_size"] and given["target_bpw"]:
        raise click.UsageError("give --target-size or --target-bpw, not both")
    limits = {"split_max_size": byte_size(given["split_max_size"]), "split_max_tensors": given["split_max_tensors"]}
    if given["keep_split"] and any(limits.values()):
        raise click.UsageError("give --keep-split or a limit of --split-max-..., not both")
    options = _options(None if has_target else rest[-1], given)
    from gguf_run.runtime.cli.quantize_methods import with_methods
    from gguf_run.runtime.quantize.plan import check_plan, make_plan

    with GGUFFile.open(find_model(model)) as file:
        plan = make_plan(file, options)
        if not dry_run or has_target:
            check_plan(plan, given["allow_requantize"])
        if has_target:
            from gguf_run.runtime.cli.quantize_target import choose

            plan = choose(file, plan, threads or default_threads(), given)
        plan = with_methods(plan, threads or default_threads(), given)
        for note in plan.notes:
            report(f"note: {note}")
        if given["save_recipe"]:
            write_recipe(given["save_recipe"], plan.items)
        if dry_run:
            yield from show_types(plan)
            return
        written = yield from run_plan(plan, Path(rest[0]), threads, limits)
    if given["evaluate"]:
        from gguf_run.runtime.cli.evaluate_compare import compared_files, table_of

        yield from table_of(compared_files([str(written)], model, [given["evaluate"]], threads=threads))


def _options(kind: str | None, given: Mapping[str, Any]) -> "Options":
    """Return the options of a plan. OptionError names the option whose value is not allowed.

    kind: TYPE; None: all tensors get the same one, until types are chosen for a target.
    """
    from gguf_run.formats.gguf.imatrix import Imatrix
    from gguf_run.runtime.quantize.plan import Options

    imatrix: Path | None = given["imatrix"]
    if (given["include_weights"] or given["exclude_weights"]) and imatrix is None:
        raise click.UsageError("--include-weights and --exclude-weights choose from an --imatrix: give one")
    output, embedding = given["output_tensor_type"], given["token_embedding_type"]
    return Options(
        kind=file_type(kind or "Q8_0"),
        overrides=Overrides(
            pure=given["pure"] or kind is None,
            leave_output=given["leave_output_tensor"],
            output_type=writable_type(output, "--output-tensor-type") if output else None,
            token_embd_type=writable_type(embedding, "--token-embedding-type") if embedding else None,
            tensor_types=(
                *(rule(text, "--tensor-type") for text in given["tensor_type"]),
                *(read_recipe(given["recipe"]) if given["recipe"] else ()),
            ),
        ),
        imatrix=Imatrix.open(imatrix) if imatrix else None,
        imatrix_path=str(imatrix or ""),
        use_entries=given["include_weights"],
        skip_entries=given["exclude_weights"],
        metadata=dict(_key_value(text) for text in given["override_kv"]),
        prune=_layers(given["prune_layers"]),
        keep_split=given["keep_split"],
    )


def _key_value(text: str) -> tuple[str, Any]:
    key, _, typed = text.partition("=")
    type, _, value = typed.partition(":")
    if key and type in _KV_TYPES:
        with suppress(KeyError, ValueError):
            return key, _KV_TYPES[type](value)
    raise OptionError(
        f"--override-kv {text}: must be KEY=TYPE:VALUE with the types int, float, bool (true, false) and str"
    )


def _layers(text: str | None) -> frozenset[int]:
    if text and not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        raise OptionError(f"--prune-layers {text}: must be numbers with commas between them: 20,21,22")
    return frozenset(map(int, text.split(","))) if text else frozenset()
