"""Importance matrices added up and written. formats/gguf/imatrix.py has the form of the file."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.imatrix import CHUNK_COUNT, CHUNK_SIZE, COUNTS, DATASETS, SUMS, Imatrix, Sums
from gguf_run.formats.gguf.writer import GGUFWriter, MetaValue, TensorInfo, Typed


def read_all(paths: Sequence[str | os.PathLike[str]], n_ctx: int | None) -> Imatrix:
    """Read files and add them up. n_ctx: tokens of a chunk; None: as the first file says, else 512."""
    files = [Imatrix.open(path) for path in paths]
    n_ctx = n_ctx or (files[0].chunk_size if files else 0) or 512
    total = Imatrix({}, (), 0, n_ctx)
    for path, file in zip(paths, files, strict=True):
        if not file.chunk_size:  # a legacy file has means of chunks, not sums of tokens
            scaled = {name: Sums(e.sums * np.float32(n_ctx), e.counts * n_ctx) for name, e in file.sums.items()}
            file = replace(file, sums=scaled)
        try:
            total = add(total, file)
        except GgufRunError as error:
            raise GgufRunError(f"{path}: {error}") from None
    return total


def add(a: Imatrix, b: Imatrix) -> Imatrix:
    """Sums over the texts of both, in chunks of a's size. GgufRunError if they cannot be of the same model."""
    sums = {**a.sums, **b.sums}
    for name in a.sums.keys() & b.sums.keys():
        sums[name] = _add(name, a.sums[name], b.sums[name])
    for name, entry in sums.items():
        if not np.isfinite(entry.sums).all():
            raise GgufRunError(f"entry {name}: its sums are not finite numbers: is the model's file damaged?")
    n_tokens = max((float(entry.counts.max()) for entry in sums.values()), default=0)
    datasets = tuple(dict.fromkeys((*a.datasets, *b.datasets)))
    return Imatrix(sums, datasets, int(n_tokens) // a.chunk_size, a.chunk_size)


def _add(name: str, a: Sums, b: Sums) -> Sums:
    """One side may have one count for all experts: it holds for each of them."""
    n = max(len(a.counts), len(b.counts))
    if a.sums.size != b.sums.size or {len(a.counts), len(b.counts)} - {1, n}:
        raise GgufRunError(
            f"entry {name} is of {b.sums.size} input channels and {len(b.counts)} experts, not of {a.sums.size} and "
            f"{len(a.counts)}: it is another model's imatrix"
        )
    with np.errstate(over="ignore"):
        return Sums(a.sums.reshape(n, -1) + b.sums.reshape(n, -1), a.counts + b.counts)


def write(path: str | os.PathLike[str], imatrix: Imatrix, inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Write the GGUF form, tensors by name. inputs: files that must not be written. Errors: see GGUFWriter."""
    metadata: dict[str, MetaValue] = {
        "general.type": "imatrix",
        DATASETS: Typed("array[string]", list(imatrix.datasets)),
        CHUNK_COUNT: Typed("u32", imatrix.chunk_count),
        CHUNK_SIZE: Typed("u32", imatrix.chunk_size),
    }
    f32 = type_by_name("F32")
    values: dict[str, NDArray[np.float32]] = {}
    for name, entry in sorted(imatrix.sums.items()):
        values |= {name + SUMS: entry.sums, name + COUNTS: entry.counts[:, None]}
    infos = [TensorInfo(name, rows.shape[::-1], f32) for name, rows in values.items()]
    with GGUFWriter(path, metadata, infos, inputs=inputs) as writer:
        for name, rows in values.items():
            writer.write(name, np.ascontiguousarray(rows, "<f4").view(np.uint8))
