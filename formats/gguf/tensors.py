"""A tensor in a GGUF file, and the section of the header that lists the tensors.

An entry of the section has these fields:

field       type           meaning
name        string         at most 63 bytes
n_dims      uint32         0 to 4
ne          uint64 each    the sizes, ne[0] first
type        uint32         the number of a TensorType
offset      uint64         from the start of the data section, a multiple of the alignment
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.types import TensorType, type_by_id
from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.frozen import frozen
from gguf_run.formats.gguf.mapped import Cursor, MappedFile, quoted

# The first two are ggml's limits (GGML_MAX_DIMS, GGML_MAX_NAME). The third is far above any real model.
MAX_DIMS = 4
MAX_NAME_BYTES = 63
MAX_TENSORS = 1 << 18


@frozen
class TensorInfo:
    """Name, shape and type of a tensor."""

    name: str
    ne: tuple[int, ...]  # 1 to 4 sizes in ggml's order: ne[0] is the length of a row. A size of 0: no elements
    type: TensorType

    @property
    def n_elements(self) -> int:
        return math.prod(self.ne)

    @property
    def n_rows(self) -> int:
        return math.prod(self.ne[1:])

    @property
    def nbytes(self) -> int:
        return self.n_rows * self.type.row_bytes(self.ne[0])

    def same_shape(self, ne: tuple[int, ...]) -> bool:
        """Whether the tensor has these sizes. Sizes of 1 at the end do not count: files may leave them out."""
        n = max(len(self.ne), len(ne))
        return self.ne + (1,) * (n - len(self.ne)) == ne + (1,) * (n - len(ne))


@frozen
class Tensor(TensorInfo):
    """A tensor in a mapped file."""

    offset: int  # of the first block, from the start of the file
    file: MappedFile = field(repr=False, compare=False)
    # A factor for the weights of each matrix; (): none. NVFP4 has them: llama.cpp keeps them in tensors "... .scale".
    scales: tuple[float, ...] = field(default=(), kw_only=True, compare=False)
    # How products round what they take: "int8" or "fp8", the columns that share a scale (0: all), and the scale (0:
    # from their largest number). None: as the type does.
    rounding: tuple[str, int, float] | None = field(default=None, kw_only=True, compare=False)

    def blocks(self, first: int = 0, end: int | None = None) -> NDArray[np.uint8]:
        """Return the bytes of rows first .. end (default: all) as uint8[rows, row_bytes], little-endian, read-only.

        The array is a view of the file. The file is read when the array is used. For a big-endian file the array is a
        copy with every field swapped.
        """
        row_bytes = self.type.row_bytes(self.ne[0])
        end = self.n_rows if end is None else end
        if not self.nbytes:  # it may lie behind the end of the file
            return np.empty((end - first, row_bytes), np.uint8)
        data = self.file.bytes_at(self.offset + first * row_bytes, (end - first) * row_bytes)
        if self.file.order == ">":
            data = data.view(self.type.dtype.newbyteorder(">")).astype(self.type.dtype).view(np.uint8)
            data.flags.writeable = False
        return data.reshape(end - first, row_bytes)

    def release(self, first: int = 0, end: int | None = None) -> None:
        """Tell the OS that rows first .. end (default: all) are not needed soon. Views stay valid."""
        row_bytes = self.type.row_bytes(self.ne[0])
        end = self.n_rows if end is None else end
        self.file.release(self.offset + first * row_bytes, (end - first) * row_bytes)


@frozen
class _Entry(TensorInfo):
    """A tensor as the header describes it."""

    offset: int  # from the start of the data section
    at: int  # the offset of the entry in the file, for errors


def read_tensors(cursor: Cursor, n_tensors: int, alignment: int) -> dict[str, Tensor]:
    """Read n_tensors entries. FormatError unless each tensor is aligned, inside the file, and overlaps no other."""
    if n_tensors > MAX_TENSORS:
        raise cursor.error(f"the header claims {n_tensors} tensors: at most {MAX_TENSORS} are allowed")
    entries: dict[str, _Entry] = {}
    for i in range(n_tensors):
        entry = _read_entry(cursor, f"tensor {i} of {n_tensors}")
        if entry.name in entries:
            raise cursor.error(f"there are two tensors called {quoted(entry.name)}", entry.at)
        entries[entry.name] = entry
    start, file = -(-cursor.at // alignment) * alignment, cursor.file
    tensors: dict[str, Tensor] = {}
    for name, entry in entries.items():
        what, end = f"tensor {quoted(name)}", start + entry.offset + entry.nbytes
        if entry.offset % alignment:
            text = f"{what} lies at {entry.offset}, not at a multiple of the alignment {alignment}"
            raise cursor.error(text, entry.at)
        if end > file.size and entry.nbytes:
            text = f"{what} ends at byte {end}, but the file has only {file.size}: it is truncated or damaged"
            raise cursor.error(f"{text}, get it again", entry.at)
        tensors[name] = Tensor(name, entry.ne, entry.type, start + entry.offset, file)
    _check_overlap(tensors.values(), file.path)
    return tensors


def _read_entry(cursor: Cursor, what: str) -> _Entry:
    at = cursor.at
    name = cursor.string(f"the name of {what}", MAX_NAME_BYTES)
    what = f"tensor {quoted(name)}"
    n_dims = cursor.number("I", f"the number of dimensions of {what}")
    if n_dims > MAX_DIMS:
        raise cursor.error(f"{what} has {n_dims} dimensions: at most {MAX_DIMS} are allowed", at)
    # ggml writes a scalar with no dimensions.
    ne = tuple(cursor.number("Q", f"the shape of {what}") for _ in range(n_dims)) or (1,)
    id = cursor.number("I", f"the type of {what}")
    offset = cursor.number("Q", f"the offset of {what}")
    if math.prod(max(1, n) for n in ne) >= 1 << 63:
        raise cursor.error(f"{what} has the shape {ne}: sizes are from 0 on, and their product below 2^63", at)
    try:
        type = type_by_id(id)
    except UnsupportedError as error:
        raise UnsupportedError(f"{cursor.file.path}: offset {at}: {what}: {error}") from None
    if ne[0] % type.block_size:
        raise cursor.error(
            f"{what} has rows of {ne[0]} weights: {type.name} needs a multiple of its block of {type.block_size}", at
        )
    return _Entry(name, ne, type, offset, at)


def _check_overlap(tensors: Iterable[Tensor], path: Path) -> None:
    ordered = sorted((tensor for tensor in tensors if tensor.nbytes), key=lambda tensor: tensor.offset)
    for one, other in itertools.pairwise(ordered):
        if one.offset + one.nbytes > other.offset:
            raise FormatError(
                f"{path}: tensor {quoted(one.name)} ends at byte {one.offset + one.nbytes}, inside tensor "
                f"{quoted(other.name)}, which begins at {other.offset}"
            )
