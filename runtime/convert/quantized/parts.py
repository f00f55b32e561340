"""The stored tensors that hold one quantized weight together, checked as they are taken."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.coded import float8
from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.errors import FormatError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.formats.safetensors import StoredArray
from gguf_run.runtime.convert.quantized.grid import Grid
from gguf_run.runtime.convert.stored.sources import F32, Source

FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Parts:
    """The stored tensors whose names begin alike."""

    stored: Mapping[str, StoredArray]  # all tensors of the checkpoint
    base: str  # the start of the names
    config: Mapping[str, Any]  # the checkpoint's quantization_config
    path: Path  # the file that holds the config
    keep: Container[str]  # the types whose blocks are wanted; other weights become F32
    used: list[str] = field(default_factory=list)  # the names of all tensors that were taken

    def get(self, end: str) -> StoredArray | None:
        """Return the tensor whose name is base + end, or None."""
        tensor = self.stored.get(self.base + end)
        if tensor is not None:
            self.used.append(tensor.name)
        return tensor

    def need(
        self, end: str, *dtypes: str, ndim: int | None = None, shape: tuple[int, ...] | None = None
    ) -> StoredArray:
        """Return the tensor whose name is base + end.

        FormatError unless it is there, with one of the dtypes (none: any) and that number of dimensions or shape.
        """
        tensor = self.get(end)
        if tensor is None:
            missing = f"{quoted(self.base + end)}, which belongs to the quantized weight {quoted(self.base)}"
            raise FormatError(f"{self.path.parent}: there is no tensor {missing}: get the checkpoint again")
        if dtypes and tensor.dtype not in dtypes:
            raise wrong(tensor, " or ".join(dtypes), f"has values of type {tensor.dtype}")
        if shape is not None and tensor.shape != shape:
            raise wrong(tensor, str(shape))
        if (ndim is not None and len(tensor.shape) != ndim) or 0 in tensor.shape:
            raise wrong(tensor, f"{ndim} dimensions of at least 1")
        return tensor

    def weight(self, name: str, grid: Grid, stored: StoredArray) -> Tensor:
        """Return the weight as blocks of the type that keeps its codes, else as F32. stored: holds the codes."""
        ne = (len(grid.groups), grid.n_out)
        if grid.kept and grid.kept in self.keep:
            return Source(name, ne, type_by_name(grid.kept), stored.file, grid.blocks)
        return Source(name, ne, F32, stored.file, grid.floats)

    def groups(self, end: str, n_in: int, n_group: int, scale: StoredArray) -> NDArray[np.int64]:
        """Return the group of each of n_in columns: those of the tensor base + end, else runs of equal length.

        A list of -1 means that the list was not set. scale: what an error about runs names.
        """
        stored, groups = self.get(end), np.full(n_in, -1)
        if stored is not None and stored.shape != (0,):
            groups = self.need(end, "I32", "I64", shape=(n_in,)).array().astype(np.int64)
        if stored is None or (groups == -1).all():
            return even_groups(n_in, n_group, scale)
        if groups.min() < 0 or groups.max() >= n_group:
            raise wrong(stored, f"0 to {n_group - 1}", f"has groups {groups.min()} to {groups.max()}")
        return groups


def wrong(tensor: StoredArray, allowed: str, found: str = "") -> FormatError:
    """Return (not raise) the error that a stored tensor is not what its method needs. found: default: its shape."""
    found = found or f"has the shape {tensor.shape}"
    return FormatError(f"{tensor.file.path}: tensor {quoted(tensor.name)} {found}, must be {allowed}")


def numbers(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Return stored values as float32. U8 is read as F8_E8M0: powers of two, code 127 is 1."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    if dtype in ("F8_E8M0", "U8"):
        powers = np.ldexp(np.float32(1), values.astype(np.int32) - 127)
        return np.where(values == 255, np.nan, powers).astype(np.float32)
    return float8(dtype)[values] if dtype.startswith("F8") else values.astype(np.float32)


def even_groups(n_in: int, n_groups: int, tensor: StoredArray) -> NDArray[np.int64]:
    """Return the group of each of n_in columns. All groups have the same length; the last one may be shorter."""
    size = -(-n_in // n_groups)
    if -(-n_in // size) != n_groups:
        raise wrong(tensor, "groups of equal size", f"has {n_groups} groups for {n_in} columns")
    return np.arange(n_in, dtype=np.int64) // size
