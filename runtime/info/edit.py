"""Changing the metadata of a GGUF file, in a new file or in place. The tensors stay the same."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.metadata import VALUE_TYPES, Metadata, Typed
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.writer import ALIGNMENT, GGUFWriter, encode_header
from gguf_run.formats.gguf.writer_metadata import as_typed, encode_pair
from gguf_run.runtime.info.diff import metadata_changes, typed_metadata
from gguf_run.runtime.info.tensors import reported

_TRUTH = {"true": True, "1": True, "false": False, "0": False}


def edit(
    file: GGUFFile,
    assignments: Sequence[str],
    removed: Sequence[str],
    output: Path | None,
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Write the file with changed metadata and return the metadata_changes.

    assignments: `key=value` or `key:type=value`.
    removed: keys.
    output: the new file; None: the file itself is changed.
    progress: see `reported`; it counts the bytes that are copied to `output`.
    OptionError for an assignment or a key that is not allowed. GgufRunError as from GGUFWriter, or if the file cannot
    be changed in place.
    """
    pairs = _edited(file.metadata, assignments, removed)
    changes = list(metadata_changes(typed_metadata(file), pairs))
    if output:
        _write(file, pairs, output, progress)
    else:
        _write_in_place(file, pairs)
    return changes


def _edited(metadata: Metadata, assignments: Sequence[str], removed: Sequence[str]) -> dict[str, Typed]:
    """Return the metadata with keys set and removed. New keys come last."""
    for key in removed:
        if key not in metadata:
            raise OptionError(f"--remove {key}: the file has no such key")
    new = [_assignment(text, metadata) for text in assignments]
    changed = [*removed, *(key for key, _ in new)]
    for key in changed:
        if changed.count(key) > 1:
            raise OptionError(f"{key}: is set or removed twice")
        if key.startswith("split."):
            raise OptionError(f"{key}: belongs to how the model is split over files, and cannot be changed")
    return {key: metadata.typed(key) for key in metadata if key not in removed} | dict(new)


def _assignment(text: str, metadata: Metadata) -> tuple[str, Typed]:
    """Return the key and the value that `key=value` or `key:type=value` sets."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise OptionError(f"--set {quoted(text)}: expected key=value or key:type=value")
    name, _, type = key.rpartition(":")
    if key in metadata:
        type = metadata.type_name(key)
    else:
        key, type = (name, type) if name else (key, "")
    try:
        typed = Typed(type, _parse(value, type)) if type else as_typed(_guess(value))
        encode_pair(key, typed, "<")
    except (KeyError, ValueError):
        raise OptionError(f"--set {quoted(text)}: {quoted(value)} is not a value of type {type}") from None
    except GgufRunError as error:
        raise OptionError(f"--set {quoted(text)}: {error}") from None
    return key, typed


def _parse(value: str, type: str) -> Any:
    """Return the value of a type. ValueError or KeyError if the text is no such value. encode_pair checks the type."""
    if type == "bool":
        return _TRUTH[value.lower()]
    if type in ("f32", "f64"):
        return float(value)
    if type.startswith("array"):
        return json.loads(value)
    return int(value, 0) if type in VALUE_TYPES and type != "string" else value


def _guess(value: str) -> Any:
    """Return the bool, number or list that the text stands for in JSON. Any other text is a string."""
    try:
        parsed = json.loads(value)
    except ValueError:
        return value
    is_finite = not isinstance(parsed, float) or math.isfinite(parsed)
    return parsed if isinstance(parsed, bool | int | float | list) and is_finite else value


def _write(file: GGUFFile, pairs: Mapping[str, Typed], output: Path, progress: Callable[[int, int], None]) -> None:
    """Write a file with this metadata and the tensors of `file`. It is split where `file` is."""
    tensors, order = list(file.tensors.values()), file.byte_order
    with GGUFWriter(output, pairs, tensors, byte_order=order, split=file.split, inputs=file.paths) as writer:
        for tensor in reported(tensors, progress):
            writer.copy(tensor)


def _write_in_place(file: GGUFFile, pairs: Mapping[str, Typed]) -> None:
    """Change the file itself (the first of a split model). GgufRunError if its tensors would have to move."""
    tensors = [tensor for tensor in file.tensors.values() if tensor.file.path == file.path]
    before = typed_metadata(file)
    old, new = (encode_header(side, tensors, file.byte_order, file.alignment) for side in (before, pairs))
    with open(file.path, "r+b") as output:
        if output.read(len(old)) != old or before.get(ALIGNMENT) != pairs.get(ALIGNMENT):
            raise GgufRunError(f"{file.path}: is laid out in a way that cannot be edited in place: use -o OUT")
        if len(new) != len(old):
            sizes = f"the new header takes {len(new)} bytes, the old one {len(old)}"
            raise GgufRunError(f"{file.path}: {sizes}: use -o OUT, the file cannot be edited in place")
        # One write of the bytes that change: other processes should not see half of them.
        changed = np.flatnonzero(np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8))
        if len(changed):
            output.seek(changed[0])
            output.write(new[changed[0] : changed[-1] + 1])
