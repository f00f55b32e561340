"""The weights of a layer in a backend's form, and how they are loaded. step.py has what a layer computes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.mapped import quoted
from gguf_run.formats.reader import Tensor
from gguf_run.models.architectures import EXPERTS, ROPE_FACTORS
from gguf_run.models.backend import Backend
from gguf_run.models.config import ModelConfig
from gguf_run.models.operands import AttentionShape, Cache, Experts, Rotation, Squares, Table, Vector, Weight
from gguf_run.models.rope import UNSCALED, make_rope

_Handle = TypeVar("_Handle")


@dataclass(frozen=True)
class Matrix(Generic[Weight, Vector]):
    """What one matmul multiplies with."""

    names: tuple[str, ...]  # tensors whose rows, one after the other, make the matrix
    weight: Weight
    bias: Vector | None


@dataclass(frozen=True)
class Norm(Generic[Vector]):
    weight: Vector
    bias: Vector | None


@dataclass(frozen=True)
class LayerExperts(Generic[Experts]):
    """The experts of one layer. They may be on another backend than the rest of the layer."""

    names: tuple[str, ...]  # tensors of gate, up and down
    experts: Experts


@dataclass(frozen=True)
class Layer(Generic[Weight, Vector, Cache]):
    """One layer without its experts. None stands for what the model does not have."""

    attn_norm: Norm[Vector] | None
    attn_qkv: Matrix[Weight, Vector]
    attn_q_norm: Norm[Vector] | None
    attn_k_norm: Norm[Vector] | None
    attn_sinks: Vector | None
    attn_output: Matrix[Weight, Vector]
    post_attention_norm: Norm[Vector] | None  # of attention's result, before the residual stream is added
    ffn_norm: Norm[Vector] | None
    parallel: bool  # attention and ffn read the same normed values
    ffn_gate_inp: Matrix[Weight, Vector] | None  # the router: logits of the experts
    ffn_gate_shexp: Matrix[Weight, Vector] | None  # weight of the shared expert
    ffn_gate_up: Matrix[Weight, Vector] | None  # of the only ffn, or of the expert that all tokens share
    ffn_down: Matrix[Weight, Vector] | None  # the same
    post_ffw_norm: Norm[Vector] | None  # of the ffn's result, before the residual stream is added
    attention: AttentionShape
    cache: Cache
    rotation: Rotation | None  # None: the layer does not rotate


class Loader(Generic[Table, Weight, Vector, Cache, Experts, Squares]):
    """Takes tensors by name out of the file and gives them to one backend."""

    def __init__(
        self,
        backend: Backend[Table, Weight, Vector, Cache, Experts, Squares],
        tensors: Mapping[str, Tensor],
        progress: Callable[[int], None],
    ) -> None:
        """progress: called with the number of bytes of each tensor that is loaded."""
        self._backend, self._tensors, self._progress = backend, tensors, progress

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

    def embeddings(self, *, tied: bool) -> Table:
        """Return the table of embeddings. tied: its tensor is the output matrix too, and reports its bytes there."""
        # The table reads rows from the file whenever they are needed: its pages are not released.
        tensor = self._tensors["token_embd.weight"]
        if not tied:
            self._progress(tensor.nbytes)
        return self._backend.table(tensor)

    def matrix(self, *names: str, bias: Sequence[str] | None = None) -> Matrix[Weight, Vector]:
        """Return a matrix of the rows of some tensors. bias: the tensors that have its bias, if not `names`."""
        weights = tuple(f"{name}.weight" for name in names)
        biases = [f"{name}.bias" for name in (bias or names)]
        weight = self._must_take(self._backend.weight, weights)
        return Matrix(weights, weight, self._take(self._backend.vector, biases))

    def norm(self, name: str) -> Norm[Vector] | None:
        weight = self._take(self._backend.vector, [f"{name}.weight"])
        return None if weight is None else Norm(weight, self._take(self._backend.vector, [f"{name}.bias"]))

    def layer(
        self, config: ModelConfig, il: int, cache: Cache, rotation: Rotation | None
    ) -> Layer[Weight, Vector, Cache]:
        """Return layer il without its experts."""
        arch, block = config.arch, f"blk.{il}."

        def matrix(*names: str) -> Matrix[Weight, Vector] | None:
            is_there = names and f"{block}{names[0]}.weight" in self._tensors
            return self.matrix(*(block + name for name in names)) if is_there else None

        qkv, output = matrix(*arch.qkv), matrix("attn_output")
        assert qkv is not None
        assert output is not None  # config has checked it
        norms = {name: self.norm(block + name) for name in arch.norms}
        gate_up, down = config.ffn(il)
        after = {name: norm for name, norm in norms.items() if name != arch.ffn_norm}
        return Layer(
            attn_norm=norms.get("attn_norm"),
            attn_qkv=qkv,
            attn_q_norm=norms.get("attn_q_norm"),
            attn_k_norm=norms.get("attn_k_norm"),
            attn_sinks=self._take(self._backend.vector, [f"{block}attn_sinks.weight"]),
            attn_output=output,
            post_attention_norm=after.get("post_attention_norm"),
            ffn_norm=norms.get(arch.ffn_norm),
            parallel="ffn_norm" in arch.optional_norms and norms["ffn_norm"] is None,
            ffn_gate_inp=matrix("ffn_gate_inp"),
            ffn_gate_shexp=matrix("ffn_gate_inp_shexp"),
            ffn_gate_up=matrix(*gate_up),
            ffn_down=matrix(down),
            post_ffw_norm=norms.get("post_ffw_norm"),
            attention=config.attention(il),
            cache=cache,
            rotation=rotation,
        )

    def experts(self, il: int) -> LayerExperts[Experts]:
        """Return the experts of layer il, which must have some."""
        weights, biases = ([f"blk.{il}.{name}.{kind}" for name in EXPERTS] for kind in ("weight", "bias"))
        return LayerExperts(tuple(weights), self._must_take(self._backend.experts, weights + biases))


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
