"""What differs between two GGUF files: metadata values, tensors, and the error of each tensor."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from gguf_run.formats.gguf.metadata import Typed
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.writer_metadata import encode_pair
from gguf_run.runtime.info.contents import tensor_facts, value_facts
from gguf_run.runtime.info.tensors import difference, reported


def compare(a: GGUFFile, b: GGUFFile, match: re.Pattern[str], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Return the differences as facts that JSON can hold.

    match: only tensors in whose names it is found.
    progress: see `reported`; it counts the bytes of `a`.
    "metadata" has the metadata_changes. Each of "different" has name, a and b, and a Difference if the shapes agree.
    """
    names_a, names_b = ([name for name in file.tensors if match.search(name)] for file in (a, b))
    shared = [a.tensors[name] for name in names_a if name in b.tensors]
    different: list[dict[str, Any]] = []
    for x in reported(shared, progress):
        y = b.tensors[x.name]
        error = difference(x, y) if x.ne == y.ne else None
        if error or x.ne != y.ne:
            sides = {"name": x.name, "a": tensor_facts(x), "b": tensor_facts(y)}
            different.append(sides | (asdict(error) if error else {}))
    return {
        "a": str(a.path),
        "b": str(b.path),
        "metadata": list(metadata_changes(typed_metadata(a), typed_metadata(b))),
        "tensors": {
            "n_identical": len(shared) - len(different),
            "only_a": [tensor_facts(a.tensors[name]) for name in names_a if name not in b.tensors],
            "only_b": [tensor_facts(b.tensors[name]) for name in names_b if name not in a.tensors],
            "different": different,
        },
    }


def typed_metadata(file: GGUFFile) -> dict[str, Typed]:
    """Return all metadata with the exact types, in file order."""
    return {key: file.metadata.typed(key) for key in file.metadata}


def metadata_changes(a: Mapping[str, Typed], b: Mapping[str, Typed]) -> Iterator[dict[str, Any]]:
    """Yield key, a and b of each value whose type or bytes differ.

    A side without the key is None. An array is shown from the first item that differs.
    """
    for key in dict.fromkeys([*a, *b]):
        both = [side[key] for side in (a, b) if key in side]
        if len({encode_pair(key, value, "<") for value in both}) == len(both):
            start = _first_difference(both) if len(both) == 2 else 0
            yield {"key": key, "a": _side(a.get(key), start), "b": _side(b.get(key), start)}


def _side(typed: Typed | None, start: int) -> dict[str, Any] | None:
    return None if typed is None else {"type": typed.type} | value_facts(typed.value, start)


def _first_difference(both: list[Typed]) -> int:
    """Return the index where two arrays of strings or numbers begin to differ, 0 for other values."""
    if not all(typed.type.startswith("array[") and not typed.type.startswith("array[array") for typed in both):
        return 0
    a, b = (typed.value for typed in both)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
