"""gguf-quantize: a model's weights in fewer bits."""

import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.cli import complete
from gguf_run.runtime.cli.common import tool
from gguf_run.runtime.cli.load_options import byte_size
from gguf_run.runtime.hub.find import find_model
from gguf_run.runtime.load.machine import default_threads
from gguf_run.runtime.quantize.rules import Overrides, file_type, writable_type
from gguf_run.runtime.terminal.progress import Progress
from gguf_run.runtime.terminal.text import message, one_line, size_text, table

if TYPE_CHECKING:
    from gguf_run.runtime.quantize.file import Loss
    from gguf_run.runtime.quantize.plan import Item, Options, Plan

_KV_TYPES: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": {"true": True, "false": False}.__getitem__}


@tool(
    "gguf-quantize",
    examples=(
        "gguf-quantize f16.gguf q4.gguf Q4_K_M",
        "gguf-quantize f16.gguf q3.gguf Q3_K_M --imatrix imatrix.gguf",
        "gguf-quantize f16.gguf Q5_K_S --dry-run",
        "gguf-quantize f16.gguf out.gguf Q4_K_M --tensor-type ffn_down=Q6_K",
    ),
)
@click.argument("model", metavar="IN", shell_complete=complete.models)
@click.argument("rest", metavar="OUT TYPE", nargs=-1, required=True, shell_complete=complete.file_types)
@click.option("--imatrix", type=click.Path(path_type=Path), help="Importance matrix, from gguf-imatrix.")
@click.option("--include-weights", multiple=True, metavar="TEXT", help="Use only its entries with TEXT in the name.")
@click.option("--exclude-weights", multiple=True, metavar="TEXT", help="Do not use its entries with TEXT in the name.")
@click.option("--pure", is_flag=True, help="One type for all matrices, no mixture.")
@click.option("--tensor-type", multiple=True, metavar="REGEX=TYPE", help="Type of the tensors whose name matches.")
@click.option(
    "--output-tensor-type",
    metavar="TYPE",
    shell_complete=complete.tensor_types,
    help="Type of the matrix that makes the logits.",
)
@click.option(
    "--token-embedding-type",
    metavar="TYPE",
    shell_complete=complete.tensor_types,
    help="Type of the token embeddings.",
)
@click.option("--leave-output-tensor", is_flag=True, help="Keep output.weight as it is.")
@click.option("--allow-requantize", is_flag=True, help="Quantize what is quantized already: it costs quality.")
@click.option("--override-kv", multiple=True, metavar="KEY=TYPE:VALUE", help="Set metadata; int, float, bool or str.")
@click.option("--prune-layers", metavar="L,...", help="Leave these layers out and number the others anew.")
@click.option("--keep-split", is_flag=True, help="Write as many files as there are, with the same tensors.")
@click.option("--split-max-size", metavar="N(K|M|G)", help="Split the output into files of at most so many bytes.")
@click.option("--split-max-tensors", type=click.IntRange(1), help="Split the output into files of so many tensors.")
@click.option("--dry-run", is_flag=True, help="Only show the types and sizes that there would be; OUT may be left out.")
@click.option("--threads", "-t", type=click.IntRange(1, 512), help="Threads.  [default: physical cores]")
def main(model: str, rest: tuple[str, ...], dry_run: bool, threads: int | None, **given: Any) -> None:
    """Write the model IN to OUT with weights of TYPE, such as Q4_K_M or Q8_0; the same bytes as llama-quantize.

    IN is a GGUF file (of a split model the first) or hf:owner/repo:F16, in F16, BF16 or F32. TYPE is a file type
    of llama-quantize by name or number; a mixture such as Q4_K_M gives the sensitive tensors more bits. COPY changes
    no tensor.
    """
    if len(rest) != 2 and not (dry_run and len(rest) == 1):
        raise click.UsageError("give IN, OUT and TYPE (with --dry-run OUT may be left out)")
    if sys.stdout is None:
        raise GgufRunError("stdout is closed: there is nowhere to write to")
    limits = {
        "split_max_size": byte_size(given.pop("split_max_size")),
        "split_max_tensors": given.pop("split_max_tensors"),
    }
    if given["keep_split"] and any(limits.values()):
        raise click.UsageError("give --keep-split or a limit of --split-max-..., not both")
    allow_requantize = given.pop("allow_requantize")
    options = _options(rest[-1], **given)
    from gguf_run.runtime.quantize.plan import check_plan, make_plan

    with GGUFFile.open(find_model(model)) as file:
        plan = make_plan(file, options)
        for note in plan.notes:
            message(f"note: {note}")
        if dry_run:
            lines = show_types(plan)
        else:
            check_plan(plan, allow_requantize)
            lines = run_plan(plan, Path(rest[0]), threads or default_threads(), limits)
        for line in lines:
            click.echo(line)


def run_plan(plan: "Plan", path: Path, n_threads: int, limits: dict[str, Any]) -> Iterator[str]:
    """Write the plan's files; yield the closing lines."""
    from gguf_run.formats.compiler.jit import compile_notice
    from gguf_run.runtime.quantize.file import quantize_file

    start = time.monotonic()
    with Progress("quantizing") as progress:

        def notify() -> None:
            progress.clear()
            message("compiling kernels for this machine; this takes some seconds, once")

        with compile_notice(notify):
            split = {name: limit or 0 for name, limit in limits.items()}
            writer, losses = quantize_file(plan, path, n_threads, progress.set, **split)
    yield from _losses(plan.items, losses)
    yield ""
    parts = f" and {len(writer.paths) - 1} more" if len(writer.paths) > 1 else ""
    yield f"{one_line(str(writer.paths[0]))}{parts}: {_total(plan)}, {time.monotonic() - start:.1f} s"


def _total(plan: "Plan") -> str:
    sources, targets = [item.source for item in plan.items], [item.target for item in plan.items]
    before, after = sum(t.nbytes for t in sources), sum(t.nbytes for t in targets)
    n = max(1, sum(t.n_elements for t in targets))
    return f"{size_text(before)} -> {size_text(after)}, {8 * before / n:.2f} -> {8 * after / n:.2f} bits per weight"


def _losses(items: "Sequence[Item]", losses: "Sequence[Loss]") -> Iterator[str]:
    """A row for each type: sizes, the error of what was converted, and the tensor that lost most."""
    from gguf_run.runtime.quantize.file import Loss

    rows = []
    for name in dict.fromkeys(item.target.type.name for item in items):
        group = [(item, loss) for item, loss in zip(items, losses, strict=True) if item.target.type.name == name]
        nbytes, n = sum(item.target.nbytes for item, _ in group), sum(item.target.n_elements for item, _ in group)
        row = [name, str(len(group)), size_text(nbytes), f"{8 * nbytes / n:.2f}"]
        converted = [(item, loss) for item, loss in group if not item.is_copy]
        if converted:
            all_of_it = sum((loss for _, loss in converted), Loss())
            worst, loss = max(converted, key=lambda pair: pair[1].relative())
            rmse = (all_of_it.error / sum(item.target.n_elements for item, _ in converted)) ** 0.5
            row += [
                f"{rmse:.3g}",
                f"{all_of_it.relative():.2%}",
                f"{loss.relative():.2%} {one_line(worst.target.name)}",
            ]
        rows.append(row if converted else [*row, "-", "-", "copied"])
    head = ["type", "tensors", "size", "bits/weight", "RMSE", "of RMS", "worst tensor"]
    return table(head, rows, "lrrrrrl")


def show_types(plan: "Plan") -> Iterator[str]:
    """What --dry-run shows."""
    yield from table(
        ["tensor", "ne", "type", "to", "size", "to", "bits/weight"],
        [
            [
                one_line(item.target.name), " x ".join(map(str, item.target.ne)), item.source.type.name,
                "" if item.is_copy else item.target.type.name, size_text(item.source.nbytes),
                size_text(item.target.nbytes), f"{8 * item.target.nbytes / item.target.n_elements:.2f}",
            ]
            for item in plan.items
        ],
        "llllrrr",
    )  # fmt: skip
    yield ""
    yield _total(plan)
    if any(item.choice.needs_imatrix and item.importance is None for item in plan.items):
        yield "this type needs --imatrix"


def _options(
    kind: str,
    imatrix: Path | None,
    include_weights: tuple[str, ...],
    exclude_weights: tuple[str, ...],
    pure: bool,
    tensor_type: tuple[str, ...],
    output_tensor_type: str | None,
    token_embedding_type: str | None,
    leave_output_tensor: bool,
    override_kv: tuple[str, ...],
    prune_layers: str | None,
    keep_split: bool,
) -> "Options":
    """Check the options' values; OptionError names the option."""
    from gguf_run.formats.gguf.imatrix import Imatrix
    from gguf_run.runtime.quantize.plan import Options

    if (include_weights or exclude_weights) and imatrix is None:
        raise click.UsageError("--include-weights and --exclude-weights choose from an --imatrix: give one")
    overrides = Overrides(
        pure,
        leave_output_tensor,
        writable_type(output_tensor_type, "--output-tensor-type") if output_tensor_type else None,
        writable_type(token_embedding_type, "--token-embedding-type") if token_embedding_type else None,
        tuple(_tensor_type(text) for text in tensor_type),
    )
    return Options(
        file_type(kind),
        overrides,
        Imatrix.open(imatrix) if imatrix else None,
        str(imatrix or ""),
        include_weights,
        exclude_weights,
        dict(_key_value(text) for text in override_kv),
        _layers(prune_layers),
        keep_split,
    )


def _tensor_type(text: str) -> tuple[re.Pattern[str], Any]:
    pattern, equals, type = text.rpartition("=")
    try:
        if pattern and equals:
            return re.compile(pattern, re.IGNORECASE), writable_type(type, f"--tensor-type {text}")
    except re.error as error:
        raise OptionError(f'--tensor-type {text}: "{pattern}" is not a regular expression: {error}') from None
    raise OptionError(f"--tensor-type {text}: must be REGEX=TYPE, as attn_v=Q6_K")


def _key_value(text: str) -> tuple[str, Any]:
    key, _, typed = text.partition("=")
    type, _, value = typed.partition(":")
    try:
        if key:
            return key, _KV_TYPES[type](value)
    except (KeyError, ValueError):
        pass
    raise OptionError(
        f"--override-kv {text}: must be KEY=TYPE:VALUE with the types int, float, bool (true, false) and str"
    )


def _layers(text: str | None) -> frozenset[int]:
    if text and not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        raise OptionError(f"--prune-layers {text}: must be numbers with commas between them: 20,21,22")
    return frozenset(map(int, text.split(","))) if text else frozenset()
