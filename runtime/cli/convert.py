"""gguf-convert: a Hugging Face checkpoint as a GGUF file, and back."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from gguf_run.formats.errors import OptionError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.cli import complete
from gguf_run.runtime.cli.byte_size import byte_size
from gguf_run.runtime.cli.common import tool
from gguf_run.runtime.cli.options import PATH
from gguf_run.runtime.cli.quantize_report import OPTIONS, run_plan, show_types
from gguf_run.runtime.hub.find import find_model
from gguf_run.runtime.quantize.file_types import FILE_TYPES, WRITABLE_FILES, file_type
from gguf_run.runtime.terminal.progress import progress
from gguf_run.runtime.terminal.text import message, one_line, size_text


@tool(
    "gguf-convert",
    params=OPTIONS,
    examples=(
        "gguf-convert folder",
        "gguf-convert folder -o model.gguf --type Q4_K_M",
        "gguf-convert hf:Qwen/Qwen3-0.6B --dry-run",
        "gguf-convert model.gguf -o folder --to-hf",
    ),
)
@click.argument("model", metavar="DIR", shell_complete=complete.models)
@click.option("--output", "-o", type=PATH, help="File, or folder for a file with its usual name.")
@click.option("--to-hf", is_flag=True, help="Convert back: DIR is a GGUF file, -o a new folder.")
@click.option(
    "--type",
    "kind",
    default="auto",
    shell_complete=complete.among(lambda typed: ["auto", *WRITABLE_FILES]),
    help="A type of gguf-quantize, or auto: the type that DIR has.",
)
@click.option("--name", help="Name of the model.  [default: from its card, or the folder]")
@click.option("--base", type=PATH, help="For an adapter: folder with the config.json of the model it adapts.")
@click.option("--vocab-only", is_flag=True, help="Convert the tokenizer and the metadata, no weights.")
def main(model: str, output: Path | None, to_hf: bool, kind: str, **given: Any) -> None:
    """Convert a checkpoint to GGUF, in one step to any TYPE, such as Q4_K_M. With --to-hf convert a GGUF file back.

    DIR is a folder or hf:owner/repo. It holds config.json, a tokenizer, and weights as safetensors (or
    pytorch_model.bin, if torch is installed). auto keeps the weights as they are: BF16, F16, or the blocks of a
    quantized checkpoint that a GGUF type can hold.

    DIR may be a PEFT adapter (LoRA) too. It becomes a GGUF adapter, for --lora.
    """
    max_size = byte_size(given["split_max_size"])
    vocab_only: bool = given["vocab_only"]
    if to_hf:
        if output is None or given["imatrix"] or given["name"] or given["dry_run"]:
            raise click.UsageError("--to-hf needs -o FOLDER, and takes --type, --split-max-size and --vocab-only only")
        lines = _export(model, output, kind, max_size, vocab_only)
    else:
        if vocab_only and (given["imatrix"] or max_size):
            raise click.UsageError("--vocab-only writes no weights: leave out --imatrix and --split-max-size")
        if vocab_only and kind.lower() != "auto":
            message("note: --vocab-only writes no weights, --type is not used")
        lines = _convert(model, output, kind, max_size, given)
    for line in lines:
        click.echo(line)


def _convert(model: str, output: Path | None, kind: str, max_size: int, given: Mapping[str, Any]) -> Iterator[str]:
    """Write a GGUF file, or only plan it, and yield the lines to print. given: the other options."""
    chosen = None if kind.lower() == "auto" else file_type(kind)
    from gguf_run.formats.gguf.imatrix import Imatrix
    from gguf_run.runtime.convert.card import file_name
    from gguf_run.runtime.convert.open_checkpoint import auto_type, kept_note, lost_notes, open_checkpoint
    from gguf_run.runtime.convert.quantized.methods import KEPT
    from gguf_run.runtime.convert.stored.checkpoint import has_weights
    from gguf_run.runtime.quantize.plan import Options, check_plan, make_plan

    imatrix, vocab_only = given["imatrix"], given["vocab_only"]
    importance = Imatrix.open(imatrix) if imatrix else None
    keep = {chosen.default} if chosen else KEPT
    folder = find_model(model, "checkpoint")
    is_adapter = (folder / "adapter_config.json").is_file() and not has_weights(folder)
    if given["vocab_only" if is_adapter else "base"]:
        no = "--vocab-only is for models" if is_adapter else "--base is for adapters"
        raise OptionError(f"{no}, and {folder} is none: leave it out")
    if is_adapter:
        from gguf_run.runtime.convert.adapter import open_adapter

        opened = open_adapter(folder, given["base"], given["name"])
    else:
        opened = open_checkpoint(folder, name=given["name"], vocab_only=vocab_only, keep=keep)
    with opened as file:
        chosen = chosen or auto_type(file)
        plan = make_plan(file, Options(chosen, imatrix=importance, imatrix_path=str(imatrix or "")))
        lost = lost_notes(folder, plan) if not (is_adapter or vocab_only) else ()
        for note in [*plan.notes, *kept_note(file, plan), *lost]:
            message(f"note: {note}")
        names = {row.id: row.name for row in FILE_TYPES.values()}
        default = file_name(file.metadata, "vocab" if vocab_only else names.get(chosen.id, "auto"))
        path = Path(default) if output is None else output / default if output.is_dir() else output
        if given["dry_run"]:
            yield from show_types(plan)
            yield f"to {one_line(str(path))}"
        else:
            check_plan(plan, allow_requantize=True)
            yield from run_plan(plan, path, given["threads"], {"split_max_size": max_size})


def _export(model: str, directory: Path, kind: str, max_size: int, vocab_only: bool) -> Iterator[str]:
    """Write a checkpoint and yield the line to print."""
    from gguf_run.runtime.convert.back.checkpoint import DTYPES, export_hf

    chosen = kind if kind == "auto" else kind.upper()
    if chosen not in ("auto", *DTYPES):
        raise OptionError(f"--type {kind}: with --to-hf auto, {', '.join(DTYPES)} are allowed")
    with GGUFFile.open(find_model(model)) as file, progress("exporting") as bar:
        names = export_hf(file, directory, chosen, max_size, vocab_only, bar.set)
    n_bytes = sum((directory / name).stat().st_size for name in names)
    yield f"{one_line(str(directory))}: {', '.join(names)} ({size_text(n_bytes)})"
