"""Gives the tensors of a file to a backend, which makes handles of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.frozen import frozen
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models.architectures import QK, QKV, ROPE_FACTORS, Architecture, experts_of, qkv_of
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.kv_cache import N_STATES, CacheLayer
from gguf_run.models.operands import UNSCALED, Rotation
from gguf_run.models.ops import Cache, Experts, Squares, State, Table, Vector, Weight
from gguf_run.models.rope import make_rope

if TYPE_CHECKING:
    from gguf_run.models.protocol import Backend

_Handle = TypeVar("_Handle")


@frozen
class Matrix(Generic[Weight, Vector]):
    """The weight and the bias of one matmul."""

    names: tuple[str, ...]  # tensors whose rows, one after the other, make the matrix
    weight: Weight
    bias: Vector | None


class Loader(Generic[Table, Weight, Vector, Cache, Experts, Squares, State]):
    """Takes tensors by name out of the file and gives them to one backend."""

    def __init__(
        self,
        backend: "Backend[Table, Weight, Vector, Cache, Experts, Squares, State]",
        tensors: Mapping[str, Tensor],
        progress: Callable[[int], None],
    ) -> None:
        """progress: called with the number of bytes of each tensor that is loaded."""
        self.backend, self._tensors, self._progress = backend, tensors, progress

    def has(self, name: str) -> bool:
        """Whether the file has the weight of this name."""
        return self._full(name) in self._tensors

    def _full(self, name: str) -> str:
        """Return the name of a weight in the file: with ".weight", unless the file has it without."""
        return name if name in self._tensors else f"{name}.weight"

    def _take(self, upload: Callable[[list[Tensor]], _Handle], names: Sequence[str]) -> _Handle:
        """Return what the backend makes of some tensors."""
        taken = [self._scaled(name) for name in names]
        handle = upload(taken)
        for tensor in taken:
            tensor.release()
            self._progress(tensor.nbytes)
        return handle

    def _optional(self, names: Sequence[str]) -> Vector | None:
        """Return the values of some tensors, None if the file has none of them. A file has all or none, see config."""
        return self._take(self.backend.vector, names) if names[0] in self._tensors else None

    def _scaled(self, name: str) -> Tensor:
        """Return a tensor. If the file has a tensor `<name>.scale` for it, its numbers become the tensor's `scales`."""
        tensor, factors = self._tensors[name], self._tensors.get(f"{name.removesuffix('.weight')}.scale")
        if factors is None or not name.endswith(".weight") or ".ffn_gate_inp." in name:
            return tensor
        if factors.type.name != "F32" or factors.n_elements != math.prod(tensor.ne[2:]):
            raise FormatError(
                f"tensor {quoted(factors.name)} has {factors.n_elements} values of {factors.type.name}, must have one "
                f"F32 for each matrix of {quoted(name)}"
            )
        return replace(tensor, scales=tuple(factors.blocks().reshape(-1).view(np.float32).tolist()))

    def table(self, name: str) -> Table:
        """Return a table of embeddings that nothing multiplies. Its rows are read from the file."""
        self._progress(self._tensors[name].nbytes)
        return self.backend.table(self._tensors[name])

    def embeddings(self) -> Table:
        """Return the table of embeddings."""
        # The table reads rows from the file whenever they are needed: its pages are not released.
        tensor = self._tensors["token_embd.weight"]
        if self.has("output"):  # otherwise this tensor is the output matrix too, which counts the progress
            self._progress(tensor.nbytes)
        return self.backend.table(tensor)

    def matrix(
        self,
        *names: str,
        bias: Sequence[str] | None = None,
        orders: Mapping[str, NDArray[np.intp]] = MappingProxyType({}),
    ) -> Matrix[Weight, Vector]:
        """Return a matrix of the rows of some tensors.

        bias: the tensors that hold the bias; None: those of `names`.
        orders: of tensors whose rows the matrix has in another order than the file.
        """
        weights = tuple(f"{name}.weight" for name in names)

        def upload(tensors: list[Tensor]) -> Weight:
            pairs = zip(names, tensors, strict=True)
            return self.backend.weight([one.ordered(orders[name]) if name in orders else one for name, one in pairs])

        weight = self._take(upload, weights)
        return Matrix(weights, weight, self._optional([f"{name}.bias" for name in (bias or names)]))

    def matrices(self, name: str, i: int | None = None) -> Matrix[Weight, Vector]:
        """Return one of a tensor's matrices, or the rows of all of them as one matrix."""
        tensor = self._tensors[f"{name}.weight"]
        parts = [tensor.matrix(one) for one in (range(tensor.ne[2]) if i is None else (i,))]
        self._progress(sum(part.nbytes for part in parts))
        return Matrix((tensor.name,), self.backend.weight(parts), None)

    def with_columns_scaled(self, name: str, scale: str) -> Matrix[Weight, Vector]:
        """Return a matrix whose columns are multiplied by the values of a vector."""
        tensor = self._tensors[f"{name}.weight"]
        values = self.values(tensor.name).reshape(tensor.n_rows, -1) * self.values(f"{scale}.weight")
        return Matrix((tensor.name,), self.backend.weight([self._held(tensor.name, values)]), None)

    def qkv(self, arch: Architecture, block: str) -> Matrix[Weight, Vector]:
        """Return the matrix that makes q, k and v. block: "blk.N."."""
        biases = [f"{block}{name}" for name in ("attn_qkv", *QKV) if f"{block}{name}.bias" in self._tensors]
        return self.matrix(*(block + name for name in qkv_of(arch, block, self._tensors)), bias=biases)

    def norm(self, name: str) -> tuple[Vector, Vector | None]:
        """Return weight and bias of a norm."""
        return self._take(self.backend.vector, [self._full(name)]), self._optional([f"{name}.bias"])

    def _held(self, name: str, values: NDArray[np.floating]) -> Tensor:
        """Return an f32 or f16 tensor of numbers that the file does not have. name: for errors and lists."""
        from gguf_run.formats.gguf.memory_file import MemoryFile

        file = MemoryFile(self._tensors["token_embd.weight"].file.path, values.tobytes())
        return Tensor(name, values.shape[::-1], type_by_name(f"F{8 * values.itemsize}"), 0, file)

    def numbers(self, name: str, values: NDArray[np.float32]) -> Vector:
        """Return numbers that the file does not have. name: for errors and lists."""
        return self.backend.vector([self._held(name, values)])

    def of_heads(self, block: str, n_head: int, n_nope: int) -> tuple[Weight, Weight]:
        """Return the matrices of latent attention's heads for queries and for values. block: "blk.N.".

        Old files have for each head n_nope rows that make keys, which are transposed here, and rows that make values.
        """
        k, v = (f"{block}{name}.weight" for name in ("attn_k_b", "attn_v_b"))
        if k in self._tensors:
            return self._take(self.backend.weight, [k]), self._take(self.backend.weight, [v])
        from gguf_run.formats.blocks.dequantizer import dequantize

        both = self._tensors[f"{block}attn_kv_b.weight"]
        kind: type[np.floating[Any]] = np.float32 if both.type.name == "F32" else np.float16
        rows = dequantize(both.blocks(), both.type).astype(kind).reshape(n_head, -1, both.ne[0])
        self._progress(both.nbytes)
        parts = (k, rows[:, :n_nope].swapaxes(1, 2)), (v, rows[:, n_nope:])
        made = [self.backend.weight([self._held(name, part)]) for name, part in parts]
        return made[0], made[1]

    def late_norms(self, block: str, head_dim: int) -> tuple[Vector, Vector]:
        """Return the weights of a layer's norms of q and k after the rotation: those of q times those of k, and ones.

        The scores are the same. Keys without weights can still be turned, which a context shift does. A model without
        these tensors has ones.
        """
        q, k = names = [f"{block}{name}.weight" for name in QK]
        ones = np.ones(head_dim, np.float32)
        first, second = map(self.values, names) if q in self._tensors else (ones, ones)
        return self.numbers(q, first * second), self.numbers(k, ones)

    def vector(self, name: str) -> Vector | None:
        """Return a tensor's values, None if the file does not have the tensor."""
        return self._optional([self._full(name)])

    def values(self, name: str) -> NDArray[np.float32]:
        """Return the values of a vector of the file."""
        from gguf_run.formats.blocks.dequantizer import dequantize

        tensor = self._tensors[name]
        self._progress(tensor.nbytes)
        return dequantize(tensor.blocks(), tensor.type).reshape(-1)

    def bias(self, name: str) -> Vector | None:
        """Return a bias that has no matrix, None if the file does not have it."""
        return self._optional([f"{name}.bias"])

    def expert_names(self, arch: Architecture, block: str) -> tuple[str, ...]:
        """Return the names of the tensors of a layer's experts. block: "blk.N."."""
        return tuple(block + name for name in experts_of(arch, block, self._tensors))

    def experts(self, names: Sequence[str]) -> Experts:
        """Return the experts of a layer. names: of their tensors."""
        parts = [f"{name}.{kind}" for kind in ("weight", "bias") for name in names]
        return self._take(self.backend.experts, [part for part in parts if part in self._tensors])


def rotations(config: ModelConfig, tensors: Mapping[str, Tensor], n_ctx: int) -> list[Rotation | None]:
    """Return the rotation of each layer, None for a layer that does not rotate. Layers with equal numbers share one."""
    arch, scaling = config.arch, config.rope_scaling
    freqs, long, short = (_factors(tensors[name]) if name in tensors else None for name in ROPE_FACTORS)
    factors = short if freqs is None else freqs
    long_factors = long if freqs is None and n_ctx > scaling.n_ctx_orig else None
    base, base_swa = config.rope_freq_base, config.rope_freq_base_swa
    has_two = base != base_swa or not arch.swa_rope_scaled
    made: dict[tuple[int, bool], Rotation] = {}
    for layer in config.layers:
        key = n_rot, is_swa = layer.n_rot, has_two and layer.window > 0
        if key in made or not n_rot:
            continue
        if is_swa:
            made[key] = make_rope(arch.rope_style, n_rot, base_swa, scaling if arch.swa_rope_scaled else UNSCALED)
        else:
            made[key] = make_rope(arch.rope_style, n_rot, base, scaling, factors, long_factors)
    return [made.get((layer.n_rot, has_two and layer.window > 0)) for layer in config.layers]


def cache_layers(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    backends: "Sequence[Backend[Any, Any, Any, Cache, Any, Any, State]]",
    kinds: Sequence[CacheType],
    n_ctx: int,
    n_batch: int,
    n_seq: int,
) -> list[CacheLayer[Cache, State]]:
    """Return the caches of all layers. backends, kinds: of each layer. The sizes: see protocol.Backend.cache."""
    layers: list[CacheLayer[Cache, State]] = []
    for il, rotation in enumerate(rotations(config, tensors, n_ctx)):
        if (owner := config.layers[il].kv_layer) != il:
            layers.append(replace(layers[owner], is_shared=True))
            continue
        backend, shape = backends[il], config.attention(il)
        cache = backend.cache(shape, n_ctx, n_batch, n_seq, kinds[il]) if shape.n_head else None
        sizes = config.mixer.states(il) if config.mixer is not None else ()
        states = tuple(backend.state(n_floats, n_seq * N_STATES) for n_floats in sizes)
        layers.append(CacheLayer(cache, shape.window, rotation, states))
    return layers


def _factors(tensor: Tensor) -> NDArray[np.float32]:
    """Return the divisors of the rotary frequencies, f32[n_rot / 2]."""
    if tensor.type.name != "F32":
        raise UnsupportedError(f"tensor {tensor.name} has the type {tensor.type.name}, must be F32")
    factors = tensor.blocks().reshape(-1).view(np.float32)
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise FormatError(f"tensor {tensor.name} has values that are not positive numbers")
    return factors
