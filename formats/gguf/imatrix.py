"""Importance matrices: for every weight matrix the mean square of each input channel over a text.

llama-imatrix writes two forms of file (common/imatrix-loader.cpp of llama.cpp).

GGUF:
F32 tensor `<name>.in_sum2`    [n_in, n_expert]    sums of squares
F32 tensor `<name>.counts`     [1, n_expert]       tokens that were summed
imatrix.datasets               array of string     names of the texts
imatrix.chunk_count            u32
imatrix.chunk_size             u32                 tokens
imatrix.inputs                 array of string     only with second moments (moments.py): by entry, in the order of the
                                                   names, the first of the entries that read the same input

Legacy .dat, all numbers int32 but the values:
n_entries
for each entry                 length of the name, name, number of calls, n_values, float32[n_values]: sums of the
                               means of each call
in newer files                 number of chunks, length of the dataset's name, name
"""

import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import FormatError
from gguf_run.formats.gguf.mapped import Cursor, MappedFile, quoted
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.strings import StringArray
from gguf_run.formats.gguf.tensors import MAX_TENSORS

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
INPUTS = "imatrix.inputs"
_MAX_NAME = 4096


@dataclass(frozen=True)
class Sums:
    """The sums of squares of one matrix."""

    sums: NDArray[np.float32]  # float32[n_expert, n_in], of a legacy file float32[1, n_expert * n_in]
    counts: NDArray[np.float32]  # float32[n_expert]: the number of squares in each sum

    def means(self) -> NDArray[np.float32]:
        """Return sums / counts, float32[n_in] or float32[n_expert, n_in]: all 1 for an expert without tokens."""
        counts = self.counts[:, None]
        means = np.where(counts > 0, self.sums / np.maximum(counts, 1), np.float32(1))
        return means[0] if len(means) == 1 else means


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix."""

    sums: Mapping[str, Sums]  # by tensor name
    datasets: tuple[str, ...]  # names of the texts
    chunk_count: int  # 0: not known
    chunk_size: int  # tokens, 0: not known
    inputs: Mapping[str, str] = field(default_factory=dict)  # see imatrix.inputs, by name; {}: no second moments

    @property
    def entries(self) -> Mapping[str, NDArray[np.float32]]:
        """The importance of each input channel by tensor name: float32[n_in] or float32[n_expert, n_in]."""
        return {name: sums.means() for name, sums in self.sums.items()}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Imatrix":
        """Read a file of either form. GgufRunError if it cannot be opened, FormatError if it is damaged."""
        with closing(MappedFile(path)) as file:
            imatrix = None if file.map[:4] == b"GGUF" else _read_legacy(Cursor(file))
        if imatrix is None:
            with GGUFFile.open(path) as gguf:
                imatrix = _read_gguf(gguf)
        for name, entry in imatrix.sums.items():
            if not all(np.isfinite(values).all() and (values >= 0).all() for values in (entry.sums, entry.counts)):
                what = f"entry {quoted(name)} has values that are not sums of squares"
                raise FormatError(f"{path}: {what}: make it again")
        return imatrix


def _read_gguf(file: GGUFFile) -> Imatrix:
    names = [name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)]
    if not names:
        raise FormatError(f"{file.path}: is not an imatrix: it has no tensors named ...{SUMS}")
    sums = {name: Sums(f32_rows(file, name + SUMS), f32_rows(file, name + COUNTS)[:, 0]) for name in names}
    for name, entry in sums.items():
        if len(entry.sums) != len(entry.counts):
            raise FormatError(
                f"{file.path}: entry {quoted(name)} has {len(entry.sums)} rows of sums, but {len(entry.counts)} counts"
            )
    texts, inputs = file.metadata.get(DATASETS), file.metadata.get(INPUTS)
    firsts = [*inputs] if isinstance(inputs, StringArray) else []
    if inputs is not None and (len(firsts) != len(sums) or not {*firsts} <= {*sums}):
        raise FormatError(f"{file.path}: {INPUTS} has other names than the entries: make the file again")
    numbers = {key: file.metadata.get(key, 0) for key in (CHUNK_COUNT, CHUNK_SIZE)}
    for key, number in numbers.items():
        if type(number) is not int or number < 0:
            raise FormatError(f"{file.path}: {key} is {number!r:.60}, must be a number of at least 0")
    datasets = tuple(texts) if isinstance(texts, StringArray) else ()
    shared = dict(zip(sorted(sums), firsts, strict=False))
    return Imatrix(sums, datasets, numbers[CHUNK_COUNT], numbers[CHUNK_SIZE], shared)


def f32_rows(file: GGUFFile, name: str) -> NDArray[np.float32]:
    """Return a tensor as float32[n_rows, ne[0]]. FormatError if it is missing, empty or of another type."""
    tensor = file.tensors.get(name)
    if tensor is None or tensor.type.name != "F32":
        found = "is missing" if tensor is None else f"is {tensor.type.name}, must be F32"
        raise FormatError(f"{file.path}: tensor {quoted(name)} {found}: make the imatrix again")
    if not tensor.n_elements:
        raise FormatError(f"{file.path}: tensor {quoted(name)} has no elements: make the imatrix again")
    return tensor.blocks().view(np.float32)


def _read_legacy(cursor: Cursor) -> Imatrix:
    n_entries = _number(cursor, "the number of entries", MAX_TENSORS)
    sums: dict[str, Sums] = {}
    for i in range(n_entries):
        what = f"entry {i + 1} of {n_entries}"
        name = _text(cursor, f"the name of {what}")
        calls = cursor.number("i", f"the number of calls of {what}")
        n = _number(cursor, f"the number of values of {what}", 2**31 - 1)
        values = cursor.file.bytes_at(cursor.skip(4 * n, f"the values of {what}"), 4 * n).view("<f4").copy()
        sums[name] = Sums(values[None], np.array([max(calls, 1)], np.float32))
    if cursor.at == cursor.file.size:
        return Imatrix(sums, (), 0, 0)
    chunk_count = cursor.number("i", "the number of chunks")
    dataset = (_text(cursor, "the dataset"),) if cursor.at < cursor.file.size else ()
    return Imatrix(sums, dataset, max(0, chunk_count), 0)


def _number(cursor: Cursor, what: str, limit: int) -> Any:
    at = cursor.at
    number = cursor.number("i", what)
    if not 1 <= number <= limit:
        raise cursor.error(f"{what} is {number}, not from 1 to {limit}: this is not an imatrix file", at)
    return number


def _text(cursor: Cursor, what: str) -> str:
    length = _number(cursor, f"the length of {what}", _MAX_NAME)
    at = cursor.skip(length, what)
    return cursor.file.map[at : at + length].rstrip(b"\0").decode(errors="replace")
