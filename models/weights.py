"""How the tensors of a file become the weights of a backend."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models.architectures import ROPE_FACTORS
from gguf_run.models.backend import Backend
from gguf_run.models.config import ModelConfig
from gguf_run.models.operands import Cache, Experts, Rotation, Squares, Table, Vector, Weight
from gguf_run.models.rope import UNSCALED, make_rope

_Handle = TypeVar("_Handle")


@dataclass(frozen=True)
class Matrix(Generic[Weight, Vector]):
    """What one matmul multiplies with."""

    names: tuple[str, ...]  # tensors whose rows, one after the other, make the matrix
    weight: Weight
    bias: Vector | None


class Loader(Generic[Table, Weight, Vector, Cache, Experts, Squares]):
    """Takes tensors by name out of the file and gives them to one backend."""

    def __init__(
        self,
        backend: Backend[Table, Weight, Vector, Cache, Experts, Squares],
        tensors: Mapping[str, Tensor],
        progress: Callable[[int], None],
    ) -> None:
        """progress: called with the number of bytes of each tensor that is loaded."""
        self.backend, self._tensors, self._progress = backend, tensors, progress

    def has(self, name: str) -> bool:
        """Whether the file has the weight of this name."""
        return f"{name}.weight" in self._tensors

    def _take(self, upload: Callable[[list[Tensor]], _Handle], names: Sequence[str]) -> _Handle | None:
        """Return what the backend makes of some tensors, None if the file has none (it has all or none, see config)."""
        taken = [self._scaled(name) for name in names if name in self._tensors]
        if not taken:
            return None
        handle = upload(taken)
        for tensor in taken:
            tensor.release()
            self._progress(tensor.nbytes)
        return handle

    def _must_take(self, upload: Callable[[list[Tensor]], _Handle], names: Sequence[str]) -> _Handle:
        handle = self._take(upload, names)
        assert handle is not None, f"config has not checked {names}"
        return handle

    def _scaled(self, name: str) -> Tensor:
        """Return a tensor, with the factors that another tensor holds for it."""
        tensor, factors = self._tensors[name], self._tensors.get(f"{name.removesuffix('.weight')}.scale")
        if factors is None or not name.endswith(".weight"):
            return tensor
        if factors.type.name != "F32" or factors.n_elements != math.prod(tensor.ne[2:]):
            raise FormatError(
                f"tensor {quoted(factors.name)} has {factors.n_elements} values of {factors.type.name}, must have one "
                f"F32 for each matrix of {quoted(name)}"
            )
        return replace(tensor, scales=tuple(factors.blocks().reshape(-1).view(np.float32).tolist()))

    def embeddings(self) -> Table:
        """Return the table of embeddings. A model without an output matrix uses the same tensor for that."""
        # The table reads rows from the file whenever they are needed: its pages are not released.
        tensor = self._tensors["token_embd.weight"]
        if self.has("output"):
            self._progress(tensor.nbytes)
        return self.backend.table(tensor)

    def matrix(self, *names: str, bias: Sequence[str] | None = None) -> Matrix[Weight, Vector]:
        """Return a matrix of the rows of some tensors. bias: the tensors that have its bias, if not `names`."""
        weights = tuple(f"{name}.weight" for name in names)
        biases = [f"{name}.bias" for name in (bias or names)]
        weight = self._must_take(self.backend.weight, weights)
        return Matrix(weights, weight, self._take(self.backend.vector, biases))

    def norm(self, name: str) -> tuple[Vector, Vector | None]:
        """Return weight and bias of a norm."""
        weight = self._must_take(self.backend.vector, [f"{name}.weight"])
        return weight, self._take(self.backend.vector, [f"{name}.bias"])

    def vector(self, name: str) -> Vector | None:
        return self._take(self.backend.vector, [f"{name}.weight"])

    def experts(self, names: Sequence[str]) -> Experts:
        """Return the experts of a layer. names: of the tensors of gate, up and down."""
        weights, biases = ([f"{name}.{kind}" for name in names] for kind in ("weight", "bias"))
        return self._must_take(self.backend.experts, weights + biases)


def rotations(config: ModelConfig, tensors: Mapping[str, Tensor], n_ctx: int) -> list[Rotation | None]:
    """Return how each layer rotates. Layers that turn alike share one object."""
    arch, scaling = config.arch, config.rope_scaling
    freqs, long, short = ROPE_FACTORS
    name = freqs if freqs in tensors else long if n_ctx > scaling.n_ctx_orig else short
    factors = _factors(tensors[name]) if arch.rope_factors and name in tensors else None
    base, base_swa = config.rope_freq_base, config.rope_freq_base_swa
    rotation = rotation_swa = make_rope(arch.rope_style, config.n_rot, base, scaling, factors)
    if base != base_swa or not arch.swa_rope_scaled:
        scaling = scaling if arch.swa_rope_scaled else UNSCALED
        rotation_swa = make_rope(arch.rope_style, config.n_rot, base_swa, scaling)
    of_layers = [rotation_swa if is_swa else rotation for is_swa in config.is_swa]
    return [of_layer if config.has_rope(il) else None for il, of_layer in enumerate(of_layers)]


def _factors(tensor: Tensor) -> NDArray[np.float32]:
    """Return what each rotary frequency is divided by."""
    if tensor.type.name != "F32":
        raise UnsupportedError(f"tensor {tensor.name} has the type {tensor.type.name}, must be F32")
    factors = tensor.blocks().reshape(-1).view(np.float32)
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise FormatError(f"tensor {tensor.name} has values that are not positive numbers")
    return factors
