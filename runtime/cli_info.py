"""gguf-info: what is in a GGUF file, and the memory it will need."""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click
import numpy as np

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.reader import GGUFFile, Tensor
from gguf_run.formats.strings import StringArray
from gguf_run.runtime.cli_common import Command, one_line
from gguf_run.runtime.fetch import find_model
from gguf_run.runtime.text_table import size_text, table

# Of an array, this many items are shown; of a text, this many characters (in the table only, JSON has all of it).
SHOWN_ITEMS = 8
SHOWN_CHARACTERS = 90


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--tensors", is_flag=True, help="List the tensors as well.")
@click.option(
    "--ctx-size",
    "-c",
    type=click.IntRange(1, 2**31 - 1),
    help="Positions of the context, for the memory needed.  [default: the model's, at most 4096]",
)
@click.version_option(package_name="gguf-run", prog_name="gguf-info")
def main(model: str, as_json: bool, tensors: bool, ctx_size: int | None) -> None:
    """Show what is in a GGUF file: metadata, sizes per tensor type, parameters, and the memory it will need.

    MODEL is a GGUF file (of a split model the first) or hf:owner/repo/file.gguf. Of long arrays the beginning is shown.
    """
    if sys.stdout is None:
        raise GgufRunError("stdout is closed: there is nowhere to write to")
    with GGUFFile.open(find_model(model)) as file:
        facts = describe(file, tensors, ctx_size)
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        for line in _lines(facts):
            click.echo(line)


def describe(file: GGUFFile, tensors: bool = False, n_ctx: int | None = None) -> dict[str, Any]:
    """Return everything that gguf-info shows, as JSON has it. Sizes are in bytes.

    n_ctx: positions for the memory needed (None: those of training, at most 4096).
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
            key: {"type": file.metadata.type_name(key)} | _value(value) for key, value in file.metadata.items()
        },
        "total": _sum(all_tensors),
        "types": _per_type(all_tensors),
        "memory": _memory(file, n_ctx),
    }
    if tensors:
        facts["tensors"] = [
            {"name": t.name, "type": t.type.name, "ne": list(t.ne), "nbytes": t.nbytes} for t in all_tensors
        ]
    return facts


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, np.ndarray | StringArray | list):
        items = value[:SHOWN_ITEMS]
        return {"length": len(value), "value": _plain(items.tolist() if isinstance(items, np.ndarray) else items)}
    return {"value": _plain(value)}


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: no infinities, nested arrays by their length."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return f"array of {len(value)}" if isinstance(value, np.ndarray | StringArray) else value


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


def _memory(file: GGUFFile, n_ctx: int | None) -> dict[str, Any]:
    """Bytes needed to run the model, or why that cannot be told: gguf-info shows any GGUF file, not only models."""
    from gguf_run.models.config import ModelConfig
    from gguf_run.runtime.memory import memory_needed
    from gguf_run.runtime.model import DEFAULT_N_CTX

    try:
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
        n_ctx = n_ctx or min(config.n_ctx_train, DEFAULT_N_CTX)
        need = memory_needed(config, file.tensors.values(), n_ctx)
    except GgufRunError as error:
        return {"unknown": one_line(str(error))}
    return {
        "n_ctx": n_ctx,
        "cache_type": "f16",
        "weights": need.weights,
        "cache": need.cache,
        "buffers": need.buffers,
        "total": need.total,
    }


def _lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """The facts for people."""
    parts = f" in {facts['n_parts']} files" if facts["n_parts"] > 1 else ""
    yield (
        f"{one_line(facts['path'])}: GGUF version {facts['version']}, {facts['byte_order']}-endian, "
        f"{size_text(facts['nbytes'])}{parts}"
    )
    yield ""
    yield from table(
        [f"metadata ({len(facts['metadata'])})", "type", "value"],
        [[one_line(key), entry["type"], _show(entry)] for key, entry in facts["metadata"].items()],
        "lll",
    )
    yield ""
    yield from table(
        ["tensor type", "tensors", "parameters", "size", "bits/weight"],
        [[row.get("type", "all"), *_numbers(row)] for row in [*facts["types"], facts["total"]]],
        "lrrrr",
    )
    yield ""
    memory = facts["memory"]
    if "unknown" in memory:
        yield f"memory needed: unknown ({memory['unknown']})"
    else:
        yield (
            f"memory needed: {size_text(memory['total'])} with a context of {memory['n_ctx']} tokens: weights "
            f"{size_text(memory['weights'])}, KV cache ({memory['cache_type']}) {size_text(memory['cache'])}, buffers "
            f"{size_text(memory['buffers'])}"
        )
    if "tensors" in facts:
        yield ""
        yield from table(
            [f"tensor ({len(facts['tensors'])})", "type", "ne", "size"],
            [
                [one_line(t["name"]), t["type"], " x ".join(map(str, t["ne"])), size_text(t["nbytes"])]
                for t in facts["tensors"]
            ],
            "lllr",
        )


def _numbers(row: Mapping[str, Any]) -> list[str]:
    bits = row["bits_per_weight"]
    size = size_text(row["nbytes"])
    return [str(row["n_tensors"]), f"{row['n_parameters']:,}", size, "-" if bits is None else f"{bits:.2f}"]


def _show(entry: Mapping[str, Any]) -> str:
    """A metadata value on one line that is not too long."""
    if "length" in entry:
        text = ", ".join(_item(item, entry["type"]) for item in entry["value"])
    else:
        value = entry["value"]
        text = value if isinstance(value, str) else _item(value, entry["type"])
    more = ", ..." if entry.get("length", 0) > SHOWN_ITEMS else ""
    if len(text) > SHOWN_CHARACTERS:
        text, more = text[:SHOWN_CHARACTERS], "..."
    return one_line(f"[{entry['length']}] {text}{more}" if "length" in entry else f"{text}{more}")


def _item(value: Any, type: str) -> str:
    """A value as JSON, an f32 with as many digits as it has."""
    if "f32" in type and isinstance(value, float):
        return str(np.float32(value))
    return json.dumps(value, ensure_ascii=False)
