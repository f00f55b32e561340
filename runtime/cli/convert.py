"""gguf-convert: a Hugging Face checkpoint as a GGUF file."""

import sys
from pathlib import Path
from typing import Any

import click

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.formats.gguf.metadata import Typed
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.cli import complete
from gguf_run.runtime.cli.common import tool
from gguf_run.runtime.cli.load_options import byte_size
from gguf_run.runtime.cli.quantize import run_plan, show_types
from gguf_run.runtime.hub.find import find_model
from gguf_run.runtime.load.machine import default_threads
from gguf_run.runtime.quantize.rules import FILE_TYPES, file_type
from gguf_run.runtime.terminal.progress import Progress
from gguf_run.runtime.terminal.text import message, one_line


@tool(
    "gguf-convert",
    examples=(
        "gguf-convert folder",
        "gguf-convert folder -o model.gguf --type Q4_K_M",
        "gguf-convert hf:Qwen/Qwen3-0.6B --dry-run",
        "gguf-convert model.gguf -o folder --to-hf",
    ),
)
@click.argument("model", metavar="DIR", shell_complete=complete.models)
@click.option("--output", "-o", type=click.Path(path_type=Path), help="File, or folder for a file with its usual name.")
@click.option("--to-hf", is_flag=True, help="Convert back: MODEL.gguf to a checkpoint in the new folder -o.")
@click.option(
    "--type",
    "kind",
    default="auto",
    shell_complete=complete.among(lambda typed: ["auto", *FILE_TYPES]),
    help="As of gguf-quantize, or auto: what DIR has.",
)
@click.option("--imatrix", type=click.Path(path_type=Path), help="Importance matrix, from gguf-imatrix.")
@click.option("--split-max-size", metavar="N(K|M|G)", help="Split the output into files of at most so many bytes.")
@click.option("--name", help="What the model is called.  [default: from its card, or the folder]")
@click.option("--vocab-only", is_flag=True, help="Convert the tokenizer and the metadata, no weights.")
@click.option("--dry-run", is_flag=True, help="Only show the types and sizes that there would be.")
@click.option("--threads", "-t", type=click.IntRange(1, 512), help="Threads.  [default: physical cores]")
def main(
    model: str,
    output: Path | None,
    to_hf: bool,
    kind: str,
    imatrix: Path | None,
    split_max_size: str | None,
    name: str | None,
    vocab_only: bool,
    dry_run: bool,
    threads: int | None,
) -> None:
    """Convert the checkpoint in DIR, or hf:owner/repo, to GGUF; in one step to any TYPE, such as Q4_K_M. Or back, with
    --to-hf: then DIR is a GGUF file.

    DIR holds config.json, a tokenizer, and weights as safetensors (or pytorch_model.bin, if torch is installed).
    auto keeps the weights as they are: BF16 or F16, and blocks of a quantized checkpoint that a GGUF type can hold.
    """
    if sys.stdout is None:
        raise GgufRunError("stdout is closed: there is nowhere to write to")
    limits = {"split_max_size": byte_size(split_max_size)}
    if to_hf:
        if output is None or imatrix or name or dry_run:
            raise click.UsageError("--to-hf needs -o FOLDER, and takes --type, --split-max-size and --vocab-only only")
        for line in _export(model, output, kind, limits["split_max_size"], vocab_only):
            click.echo(line)
        return
    chosen = None if kind.lower() == "auto" else file_type(kind)
    if vocab_only and (imatrix or split_max_size):
        raise click.UsageError("--vocab-only writes no weights: leave out --imatrix and --split-max-size")
    from gguf_run.formats.gguf.imatrix import Imatrix
    from gguf_run.runtime.convert.card import file_name
    from gguf_run.runtime.convert.open_checkpoint import auto_type, kept_note, open_checkpoint
    from gguf_run.runtime.convert.quantized.methods import KEPT
    from gguf_run.runtime.quantize.plan import Options, check_plan, make_plan

    importance = Imatrix.open(imatrix) if imatrix else None
    keep = KEPT if chosen is None else {chosen.default}
    with open_checkpoint(find_model(model, "checkpoint"), name=name, vocab_only=vocab_only, keep=keep) as file:
        metadata: dict[str, Any] = {}
        if chosen is None:
            chosen, number = auto_type(file)
            metadata = {} if number is None else {"general.file_type": Typed("u32", number)}
        elif vocab_only:
            message("note: --vocab-only writes no weights, --type is not used")
        plan = make_plan(file, Options(chosen, imatrix=importance, imatrix_path=str(imatrix or ""), metadata=metadata))
        stated = plan.metadata.get("general.file_type")
        id = stated.value if isinstance(stated, Typed) else stated
        type_name = next((row.name for row in FILE_TYPES.values() if row.id == id), "auto")
        default = file_name(file.metadata, None if vocab_only else type_name)
        path = Path(default) if output is None else output / default if output.is_dir() else output
        kept = kept_note(file, plan)
        for note in [*plan.notes, *([kept] if kept else [])]:
            message(f"note: {note}")
        if dry_run:
            lines = show_types(plan)
        else:
            check_plan(plan, allow_requantize=True)
            lines = run_plan(plan, path, threads or default_threads(), limits)
        for line in lines:
            click.echo(line)
        if dry_run:
            click.echo(f"to {one_line(str(path))}")


def _export(model: str, directory: Path, kind: str, shard_size: int, vocab_only: bool) -> list[str]:
    """Write a checkpoint; return what to say about it."""
    from gguf_run.runtime.convert.back.checkpoint import DTYPES, export_hf

    chosen = kind if kind == "auto" else kind.upper()
    if chosen not in ("auto", *DTYPES):
        raise OptionError(f"--type {kind}: with --to-hf auto, {', '.join(DTYPES)} are allowed")
    with GGUFFile.open(find_model(model)) as file, Progress("exporting") as progress:
        names = export_hf(file, directory, chosen, shard_size, vocab_only, progress.set)
    n_bytes = sum((directory / name).stat().st_size for name in names)
    return [f"{one_line(str(directory))}: {', '.join(names)} ({n_bytes / 1e6:.1f} MB)"]
