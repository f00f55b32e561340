"""The stored tensors that hold one quantized weight together, checked as they are taken."""

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.errors import FormatError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.formats.safetensors import StoredArray
from gguf_run.runtime.convert.quantized.grid import Grid
from gguf_run.runtime.convert.stored.sources import F32, float8, source

FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Parts:
    """base: the start of their names. config: the checkpoint's quantization_config, from the file `path`. keep: the
    types whose blocks are wanted. used: the names of all that were taken."""

    stored: Mapping[str, StoredArray]
    base: str
    config: Mapping[str, Any]
    path: Path
    keep: Container[str]
    used: list[str] = field(default_factory=list)

    def get(self, end: str) -> StoredArray | None:
        """Return the tensor whose name is base + end, or None."""
        tensor = self.stored.get(self.base + end)
        if tensor is not None:
            self.used.append(tensor.name)
        return tensor

    def need(
        self, end: str, *dtypes: str, ndim: int | None = None, shape: tuple[int, ...] | None = None
    ) -> StoredArray:
        """Return that tensor. FormatError unless it is there, of one of the dtypes (if any are given) and of the
        number of dimensions or the shape."""
        tensor = self.get(end)
        if tensor is None:
            raise FormatError(f"{self.path.parent}: there is no tensor {quoted(self.base + end)}, which belongs to the "
                              f"quantized weight {quoted(self.base)}: get the checkpoint again")  # fmt: skip
        if dtypes and tensor.dtype not in dtypes:
            raise wrong(tensor, f"has values of type {tensor.dtype}", " or ".join(dtypes))
        if shape is not None and tensor.shape != shape:
            raise wrong(tensor, f"has the shape {tensor.shape}", str(shape))
        if (ndim is not None and len(tensor.shape) != ndim) or 0 in tensor.shape:
            raise wrong(tensor, f"has the shape {tensor.shape}", f"{ndim} dimensions of at least 1")
        return tensor

    def weight(self, name: str, grid: Grid, stored: StoredArray) -> Tensor:
        """Return the weight as blocks of the type that keeps its codes, or as F32. stored: what holds the codes."""
        shape = (grid.n_out, len(grid.groups))
        if grid.kept and grid.kept in self.keep:
            return source(name, shape, type_by_name(grid.kept), stored.file, grid.blocks)
        return source(name, shape, F32, stored.file, grid.floats)


def wrong(tensor: StoredArray, found: str, allowed: str) -> FormatError:
    """Return (not raise) the error that a stored tensor is not what its method says."""
    return FormatError(f"{tensor.file.path}: tensor {quoted(tensor.name)} {found}, must be {allowed}")


def numbers(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Return values of a stored tensor as float32; U8 is taken for F8_E8M0, exponents of two less 127."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    if dtype in ("F8_E8M0", "U8"):
        return np.where(values == 255, np.nan, np.ldexp(np.float32(1), values.astype(np.int32) - 127)).astype(
            np.float32
        )
    return float8(dtype)[values] if dtype.startswith("F8") else values.astype(np.float32)


def even_groups(n_in: int, n_groups: int, tensor: StoredArray) -> NDArray[np.int64]:
    """Return the group of each of n_in columns, of n_groups of equal length (the last may be shorter)."""
    size = -(-n_in // n_groups)
    if -(-n_in // size) != n_groups:
        raise wrong(tensor, f"has {n_groups} groups for {n_in} columns", "groups of equal size")
    return np.arange(n_in, dtype=np.int64) // size


def rows_of(shape: tuple[int, ...]) -> int:
    """Return the product of all sizes but the last."""
    return math.prod(shape[:-1])
