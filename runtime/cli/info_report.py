"""The facts of runtime/info as lines for people."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from gguf_run.runtime.info.contents import SHOWN_ITEMS
from gguf_run.runtime.info.tensors import TensorStatistics
from gguf_run.runtime.load.options import DEFAULT_N_CTX
from gguf_run.runtime.terminal.table import table
from gguf_run.runtime.terminal.text import one_line, size_text

_STATISTICS = tuple(column.name for column in fields(TensorStatistics))
_SHOWN_CHARACTERS = 90  # of a metadata value; JSON has all of it

Facts = Mapping[str, Any]


def file_lines(facts: Facts, with_caches: bool) -> Iterator[str]:
    """Yield what a file holds. with_caches: also the memory for every type of KV cache."""
    parts = f" in {facts['n_parts']} files" if facts["n_parts"] > 1 else ""
    form = f"GGUF version {facts['version']}, {facts['byte_order']}-endian"
    yield f"{one_line(facts['path'])}: {form}, {size_text(facts['nbytes'])}{parts}"
    yield ""
    yield from table(
        [f"metadata ({len(facts['metadata'])})", "type", "value"],
        [[one_line(key), entry["type"], _value(entry)] for key, entry in facts["metadata"].items()],
        "lll",
    )
    yield ""
    yield from table(
        ["tensor type", "tensors", "parameters", "size", "bits/weight"],
        [
            [
                row.get("type", "all"), str(row["n_tensors"]), f"{row['n_parameters']:,}", size_text(row["nbytes"]),
                _number(row["bits_per_weight"], ".2f"),
            ]
            for row in [*facts["types"], facts["total"]]
        ],
        "lrrrr",
    )  # fmt: skip
    yield ""
    if "adapter" in facts:
        ranks = ", ".join(map(str, facts["adapter"]["ranks"]))
        yield f"adapter (LoRA) for {facts['adapter']['n_adapted']} tensors of a model: rank {ranks or 'none'}"
    else:
        yield from _memory_lines(facts["memory"], with_caches)
    if "tensors" in facts:
        yield ""
        yield from _tensor_lines(facts["tensors"])


def _memory_lines(facts: Facts, with_caches: bool) -> Iterator[str]:
    if "unknown" in facts:
        yield f"memory needed: unknown ({one_line(facts['unknown'])})"
        return
    weights, cache, buffers = (size_text(facts[name]) for name in ("weights", "cache", "buffers"))
    yield (
        f"memory needed: {size_text(facts['total'])} with a context of {facts['n_ctx']} tokens: weights {weights}, "
        f"KV cache ({facts['cache_type']}) {cache}, buffers {buffers}"
    )
    yield from facts.get("placement", ())
    if with_caches:
        rest, f16 = facts["total"] - facts["cache"], facts["cache_types"]["f16"]
        yield ""
        yield from table(
            ["cache type", "KV cache", "of f16", "memory needed"],
            [
                [name, size_text(nbytes), f"{nbytes / f16:.2f}", size_text(rest + nbytes)]
                for name, nbytes in facts["cache_types"].items()
            ],
            "lrrr",
        )


def _tensor_lines(tensors: Sequence[Facts]) -> Iterator[str]:
    names = _STATISTICS if any("rms" in tensor for tensor in tensors) else ()
    titles = [name.removeprefix("n_").replace("_", " ") for name in names]
    yield from table(
        [f"tensor ({len(tensors)})", "type", "ne", "size", *titles],
        [
            [one_line(t["name"]), t["type"], _shape(t), size_text(t["nbytes"]), *(_number(t[n], ".4g") for n in names)]
            for t in tensors
        ],
        "lllr" + "r" * len(names),
    )


def _shape(tensor: Facts) -> str:
    return " x ".join(map(str, tensor["ne"]))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _value(entry: Facts) -> str:
    """Return a metadata value on one line. A long value is cut."""
    value, start, length = entry["value"], entry.get("from", 0), entry.get("length", 0)
    place, more = "", ""
    if "length" in entry:
        text = ", ".join(_item(item, entry["type"]) for item in value)
        place = f"[{length}] " + (f"from {start}: " if start else "")
        more = ", ..." if length > start + SHOWN_ITEMS else ""
    else:
        text = value if isinstance(value, str) else _item(value, entry["type"])
    if len(text) > _SHOWN_CHARACTERS:
        text, more = text[:_SHOWN_CHARACTERS], "..."
    return one_line(f"{place}{text}{more}")


def _item(value: Any, type: str) -> str:
    """Return a value as JSON, an f32 with no more digits than it has."""
    if "f32" in type and isinstance(value, float):
        return str(np.float32(value))
    return json.dumps(value, ensure_ascii=False)


def change_lines(changes: Sequence[Facts]) -> Iterator[str]:
    """Yield metadata_changes: `-` before the old value, `+` before the new one."""
    for change in changes:
        for sign, side in (("-", change["a"]), ("+", change["b"])):
            if side:
                yield f"{sign} {one_line(change['key'])}  {side['type']}  {_value(side)}"


def diff_lines(facts: Facts) -> Iterator[str]:
    """Yield the differences of two files: `-` before what only A has, `+` before what only B has."""
    tensors = facts["tensors"]
    yield f"- {one_line(facts['a'])}"
    yield f"+ {one_line(facts['b'])}"
    yield ""
    yield f"metadata: {len(facts['metadata'])} keys differ"
    yield from change_lines(facts["metadata"])
    yield ""
    yield (
        f"tensors: {tensors['n_identical']} are identical, {len(tensors['different'])} differ, "
        f"{len(tensors['only_a'])} only in A, {len(tensors['only_b'])} only in B"
    )
    for sign, side in (("-", "only_a"), ("+", "only_b")):
        for tensor in tensors[side]:
            yield f"{sign} {one_line(tensor['name'])}  {tensor['type']}  {_shape(tensor)}"
    if tensors["different"]:
        yield ""
        yield from table(
            ["tensor", "A", "B", "RMSE", "relative", "max", "different", ""],
            [[one_line(t["name"]), t["a"]["type"], t["b"]["type"], *_errors(t)] for t in tensors["different"]],
            "lllrrrrl",
        )


def _errors(t: Facts) -> list[str]:
    if "rmse" not in t:
        return ["-", "-", "-", "-", f"shape {_shape(t['a'])} and {_shape(t['b'])}"]
    note = f"{t['n_not_finite']} differences are not finite" if t["n_not_finite"] else ""
    relative = _number(t["relative_rmse"], ".4%")
    return [f"{t['rmse']:.4g}", relative, f"{t['max_abs']:.4g}", f"{t['n_different']:,}", note]


def fit_lines(machine: Facts, models: Sequence[Facts]) -> Iterator[str]:
    """Yield what fits the machine: a row for each type of each model."""
    from gguf_run.runtime.info.fit import CACHES

    free = machine["available_memory"]
    yield (
        f"{'unknown' if free is None else size_text(free)} free; {machine['n_threads']} threads, "
        f"{machine['instructions']}: {machine['read_bytes_per_second'] / 1e9:.3g} GB/s, "
        f"{machine['int8_operations_per_second'] / 1e12:.3g}e12 int8 operations/s"
    )
    yield ""
    head = ["model", "type", "bits", "file", "memory", *(f"ctx {kind}" for kind in CACHES), "decode/s", "prefill/s"]
    rows = []
    for model in models:
        for row in model["rows"]:
            name = one_line(Path(model["model"]).name) if row is model["rows"][0] else ""
            sizes = [f"{row['bits_per_weight']:.2f}", f"{row['nbytes'] / 1e9:.2f}", f"{row['memory'] / 1e9:.2f}"]
            contexts = [str(row["contexts"][kind] or "no room") if kind in row["contexts"] else "-" for kind in CACHES]
            speeds = [_speed(row[key]) if any(row["contexts"].values()) else "-" for key in ("decode", "prefill")]
            rows.append([name, row["type"], *sizes, *contexts, *speeds])
    yield from table(head, rows, "ll" + "r" * (len(head) - 2))
    yield ""
    yield f"Sizes in GB; memory with {DEFAULT_N_CTX} tokens of f16 cache. ctx: the largest context that"
    yield "fits, up to the model's own. Tokens per second are estimates."


def _speed(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def ops_lines(facts: Facts) -> Iterator[str]:
    """Yield the ops of a token, one a line, and their sums."""
    ops, totals = facts["ops"], facts["by_op"]
    every = {"op": "all", "count": len(ops)} | {key: sum(op[key] for op in ops) for key in ("nbytes", "operations")}
    yield f"ops of one token at the end of a context of {facts['n_ctx']} tokens, and what each reads and computes"
    yield ""
    yield from table(
        [f"op ({len(ops)})", "tensors", "types", "bytes read", "operations"],
        [[op["op"], _names(op["tensors"]), ", ".join(op["types"]), *_numbers(op)] for op in ops],
        "lllrr",
    )
    yield ""
    yield from table(
        ["op", "count", "bytes read", "operations"],
        [[row["op"], str(row["count"]), *_numbers(row)] for row in [*totals, every]],
        "lrrr",
    )


def _names(names: Sequence[str]) -> str:
    """blk.0.attn_q.weight, blk.0.attn_k.weight -> blk.0.attn_q, attn_k; biases are left out."""
    shown = [name.removesuffix(".weight") for name in names if not name.endswith(".bias")]
    return ", ".join([*shown[:1], *(name.split(".")[-1] for name in shown[1:])])


def _numbers(row: Facts) -> list[str]:
    return [size_text(row["nbytes"]), f"{row['operations']:,}"]
