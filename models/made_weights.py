"""Weights that a file does not have as they are used: parts of its tensors, or numbers that are computed from them."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.gguf.memory_file import MemoryFile
from gguf_run.formats.gguf.parts import matrix_of
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models.architectures import QK
from gguf_run.models.ops import Vector, Weight
from gguf_run.models.weights import Loader, Matrix

_Loader: TypeAlias = Loader[Any, Weight, Vector, Any, Any, Any, Any]


def values(load: _Loader[Weight, Vector], name: str) -> NDArray[np.float32]:
    """Return the values of a vector of the file."""
    tensor = load.tensors[name]
    load.progress(tensor.nbytes)
    return dequantize(tensor.blocks(), tensor.type).reshape(-1)


def _held(load: _Loader[Weight, Vector], name: str, values: NDArray[np.floating]) -> Tensor:
    """Return an f32 or f16 tensor of numbers that the file does not have. name: for errors and lists."""
    file = MemoryFile(load.tensors["token_embd.weight"].file.path, values.tobytes())
    return Tensor(name, values.shape[::-1], type_by_name(f"F{8 * values.itemsize}"), 0, file)


def numbers(load: _Loader[Weight, Vector], name: str, values: NDArray[np.float32]) -> Vector:
    """Return numbers that the file does not have. name: for errors and lists."""
    return load.backend.vector([_held(load, name, values)])


def matrices(load: _Loader[Weight, Vector], name: str, i: int | None = None) -> Matrix[Weight, Vector]:
    """Return one of a tensor's matrices, or the rows of all of them as one matrix."""
    tensor = load.tensors[f"{name}.weight"]
    parts = [matrix_of(tensor, one) for one in (range(tensor.ne[2]) if i is None else (i,))]
    load.progress(sum(part.nbytes for part in parts))
    return Matrix((tensor.name,), load.backend.weight(parts), None)


def with_columns_scaled(load: _Loader[Weight, Vector], name: str, scale: str) -> Matrix[Weight, Vector]:
    """Return a matrix whose columns are multiplied by the values of a vector."""
    tensor = load.tensors[f"{name}.weight"]
    scaled = values(load, tensor.name).reshape(tensor.n_rows, -1) * values(load, f"{scale}.weight")
    return Matrix((tensor.name,), load.backend.weight([_held(load, tensor.name, scaled)]), None)


def of_heads(load: _Loader[Weight, Vector], block: str, n_head: int, n_nope: int) -> tuple[Weight, Weight]:
    """Return the matrices of latent attention's heads for queries and for values. block: "blk.N.".

    Old files have for each head n_nope rows that make keys, which are transposed here, and rows that make values.
    """
    k, v = (f"{block}{name}.weight" for name in ("attn_k_b", "attn_v_b"))
    if k in load.tensors:
        return load.take(load.backend.weight, [k]), load.take(load.backend.weight, [v])
    both = load.tensors[f"{block}attn_kv_b.weight"]
    kind: type[np.floating[Any]] = np.float32 if both.type.name == "F32" else np.float16
    rows = dequantize(both.blocks(), both.type).astype(kind).reshape(n_head, -1, both.ne[0])
    load.progress(both.nbytes)
    parts = (k, rows[:, :n_nope].swapaxes(1, 2)), (v, rows[:, n_nope:])
    made = [load.backend.weight([_held(load, name, part)]) for name, part in parts]
    return made[0], made[1]


def late_norms(load: _Loader[Weight, Vector], block: str, head_dim: int) -> tuple[Vector, Vector]:
    """Return the weights of a layer's norms of q and k after the rotation: those of q times those of k, and ones.

    The scores are the same. Keys without weights can still be turned, which a context shift does. A model without
    these tensors has ones.
    """
    q, k = names = [f"{block}{name}.weight" for name in QK]
    ones = np.ones(head_dim, np.float32)
    first, second = (values(load, name) for name in names) if q in load.tensors else (ones, ones)
    return numbers(load, q, first * second), numbers(load, k, ones)
