"""gguf-info A --diff B: what differs between two files. In the text, `-` stands before what A has, `+` before B's."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gguf_run.formats.gguf.metadata import Typed
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.formats.gguf.writer_metadata import encode_pair
from gguf_run.runtime.info.tensors import difference
from gguf_run.runtime.info.values import describe_value, show_value
from gguf_run.runtime.terminal.progress import Progress
from gguf_run.runtime.terminal.text import one_line, table


def compare(a: GGUFFile, b: GGUFFile, match: re.Pattern[str]) -> dict[str, Any]:
    """Return the differences, as JSON has them. match: only tensors whose names hold it.

    metadata: see metadata_changes. A tensor that differs has name, a, b and, if the shapes are the same, what
    info_tensors.Difference has.
    """
    names_a, names_b = ({name: None for name in file.tensors if match.search(name)} for file in (a, b))
    shared = [name for name in names_a if name in names_b]
    total, done = sum(a.tensors[name].nbytes for name in shared), 0
    different: list[dict[str, Any]] = []
    with Progress("comparing") as progress:
        for name in shared:
            x, y = a.tensors[name], b.tensors[name]
            error = difference(x, y) if x.ne == y.ne else None
            if error or x.ne != y.ne:
                different.append({"name": name, "a": _side(x), "b": _side(y)} | (asdict(error) if error else {}))
            done += x.nbytes
            progress.set(done, total)
    return {
        "a": str(a.path),
        "b": str(b.path),
        "metadata": list(metadata_changes(*({key: m.typed(key) for key in m} for m in (a.metadata, b.metadata)))),
        "tensors": {
            "n_identical": len(shared) - len(different),
            "only_a": [_side(a.tensors[name]) for name in names_a if name not in names_b],
            "only_b": [_side(b.tensors[name]) for name in names_b if name not in names_a],
            "different": different,
        },
    }


def _side(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "type": tensor.type.name, "ne": list(tensor.ne)}


def metadata_changes(a: Mapping[str, Typed], b: Mapping[str, Typed]) -> Iterator[dict[str, Any]]:
    """Yield key, a and b (None where there is no such key) of each value whose type or bytes differ. Of arrays: the
    items from the first that differs."""
    for key in dict.fromkeys([*a, *b]):
        both = [side[key] for side in (a, b) if key in side]
        if len({encode_pair(key, value, "<") for value in both}) == len(both):
            start = _first_difference(both) if len(both) == 2 else 0
            yield {"key": key} | {name: _value(side.get(key), start) for name, side in (("a", a), ("b", b))}


def _value(typed: Typed | None, start: int) -> dict[str, Any] | None:
    return None if typed is None else {"type": typed.type} | describe_value(typed.value, start)


def _first_difference(both: list[Typed]) -> int:
    """Where two arrays of strings or numbers begin to differ; 0 for other values."""
    if not all(typed.type.startswith("array[") and not typed.type.startswith("array[array") for typed in both):
        return 0
    a, b = (typed.value for typed in both)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def change_lines(changes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Metadata changes for people."""
    for change in changes:
        for sign, side in (("-", change["a"]), ("+", change["b"])):
            if side:
                yield f"{sign} {one_line(change['key'])}  {side['type']}  {show_value(side)}"


def diff_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """The differences for people."""
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
        for t in tensors[side]:
            yield f"{sign} {one_line(t['name'])}  {t['type']}  {_shape(t)}"
    if tensors["different"]:
        yield ""
        yield from table(
            ["tensor", "A", "B", "RMSE", "relative", "max", "different", ""],
            [[one_line(t["name"]), t["a"]["type"], t["b"]["type"], *_errors(t)] for t in tensors["different"]],
            "lllrrrrl",
        )


def _errors(t: Mapping[str, Any]) -> list[str]:
    if "rmse" not in t:
        return ["-", "-", "-", "-", f"shape {_shape(t['a'])} and {_shape(t['b'])}"]
    relative = "-" if t["relative_rmse"] is None else f"{t['relative_rmse']:.4%}"
    note = f"{t['n_not_finite']} differences are not finite" if t["n_not_finite"] else ""
    return [f"{t['rmse']:.4g}", relative, f"{t['max_abs']:.4g}", f"{t['n_different']:,}", note]


def _shape(t: Mapping[str, Any]) -> str:
    return " x ".join(map(str, t["ne"]))
