"""The numbers of a model, from GGUF metadata and tensor shapes, all checked before anything relies on them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models.architectures import (
    ARCHITECTURES,
    EXPERTS,
    LAYER_SHAPES,
    MODEL_SHAPES,
    ROPE_FACTORS,
    SHARED,
    Architecture,
    Shape,
)
from gguf_run.models.backend import Attention, Moe
from gguf_run.models.rope import SCALING_TYPES, RopeScaling

_MAX_LAYERS = 1024
_MAX_EXPERTS = 1024
_MAX_SIZE = 2**31 - 1

# Keys that change what a model computes in ways the decoder does not have yet, and the value that changes nothing.
_NEUTRAL: Mapping[str, float | bool] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.temperature_scale": 0,
    "expert_group_count": 1,
}
# Tensors that nobody reads: old converters wrote them; scales of activations for GPUs that multiply in NVFP4.
_UNUSED_SUFFIXES = (".attn_rot_embd.weight", ".rope_freqs.weight", ".input_scale")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of one model, in ggml's names.

    n_head query heads share n_head_kv heads of keys and values, each of head_dim values, n_rot of which are rotated.
    is_swa: per layer, whether it sees only the last `window` positions. attention_scale multiplies q.k, logit_scale the
    logits, embd_scale the embeddings. n_expert: 0 where there are none; then moe says nothing. The first
    n_layer_dense_lead layers have no experts. n_ff_shexp: width of the expert that all tokens share, or 0.

    A model with a residual scale r has a residual stream divided by r: nothing has to be multiplied then, since norms
    see no difference if rms_eps is divided by r^2, as it is here, and the embeddings by r.
    """

    arch: Architecture
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_rot: int
    n_vocab: int
    n_ctx_train: int
    rms_eps: float
    rope_freq_base: float
    rope_freq_base_swa: float
    rope_scaling: RopeScaling
    window: int
    is_swa: tuple[bool, ...]
    attention_scale: float
    attn_softcap: float
    embd_scale: float
    logit_scale: float
    final_softcap: float
    n_expert: int
    n_layer_dense_lead: int
    n_ff_exp: int
    n_ff_shexp: int
    moe: Moe

    @property
    def n_embd_q(self) -> int:
        """Width of the queries of a token."""
        return self.n_head * self.head_dim

    @property
    def n_embd_kv(self) -> int:
        """Width of the keys, and of the values, of a token."""
        return self.n_head_kv * self.head_dim

    @property
    def n_rope_freqs(self) -> int:
        """Pairs of dimensions that are rotated."""
        return self.n_rot // 2

    def attention(self, il: int) -> Attention:
        """Return the shape of layer il's attention."""
        window = self.window if self.is_swa[il] else 0
        return Attention(self.n_head, self.n_head_kv, self.head_dim, self.attention_scale, window, self.attn_softcap)

    def has_rope(self, il: int) -> bool:
        """Whether layer il rotates q and k."""
        return not self.arch.no_rope_period or (il + 1) % self.arch.no_rope_period != 0

    def has_experts(self, il: int) -> bool:
        return bool(self.n_expert) and il >= self.n_layer_dense_lead

    def ffn(self, il: int) -> tuple[tuple[str, ...], str]:
        """Return what layer il's matrices of gate and up, and of down, are called; () and "" if it has experts only."""
        if not self.has_experts(il):
            return self.arch.gate_up, "ffn_down"
        return (SHARED[:2], SHARED[2]) if self.n_ff_shexp else ((), "")

    def tensors(self, *, optional: bool) -> dict[str, Shape]:
        """Return name and shape of the tensors without which the model cannot run, or of those that are used if there:
        biases, an output matrix ..."""
        arch = self.arch
        shapes = {**LAYER_SHAPES, **arch.shapes}
        if optional:
            names = ["output.weight", "output.bias", *(["output_norm.bias"] if arch.layer_norm else [])]
            found = {name: MODEL_SHAPES[name] for name in names}
            found |= dict.fromkeys(ROPE_FACTORS if arch.rope_factors else (), ("n_rope_freqs",))
        else:
            found = {name: MODEL_SHAPES[name] for name in ("token_embd.weight", "output_norm.weight")}
        norms = [name for name in arch.norms if (name in arch.optional_norms) == optional]
        for il in range(self.n_layer):
            gate_up, down = self.ffn(il)
            matrices = [*arch.qkv, "attn_output", *gate_up, *([down] if down else [])]
            if self.has_experts(il):
                matrices += ["ffn_gate_inp", *EXPERTS, *(["ffn_gate_inp_shexp"] if arch.shared_gate else [])]
            names = norms if optional else [*norms, *matrices, *(["attn_sinks"] if arch.sinks else [])]
            found |= {f"blk.{il}.{name}.weight": shapes[name] for name in names}
            if optional:
                biased = matrices + ([name for name in arch.norms if name.endswith("norm")] if arch.layer_norm else [])
                found |= {f"blk.{il}.{name}.bias": shapes[name][1:] or shapes[name] for name in biased}
        return found

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "ModelConfig":
        """Read and check everything that the decoder will rely on, shapes of all tensors included.

        Raises FormatError for a key or tensor that is missing or wrong, UnsupportedError for an architecture or a
        feature that this program does not have; neither knows the name of the file.
        """
        name = metadata.get("general.architecture")
        if not isinstance(name, str):
            raise FormatError(f"general.architecture is {_show(name)}, must be the name of an architecture")
        if name not in ARCHITECTURES:
            known = ", ".join(sorted(ARCHITECTURES))
            raise UnsupportedError(f"general.architecture is {_show(name)}; this program runs: {known}")
        config = _read(ARCHITECTURES[name], _Keys(metadata, name), tensors)
        _check_tensors(config, tensors)
        return config


def _show(value: Any) -> str:
    """Return a value as one short line."""
    if value is None:
        return "missing"
    if isinstance(value, str | int | float):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    return f"an array of {len(value)} values"


@dataclass(frozen=True)
class _Keys:
    """The metadata of one architecture: typed look-ups that name key, value found and values allowed."""

    metadata: Mapping[str, Any]
    prefix: str

    def get(self, key: str) -> Any:
        return self.metadata.get(f"{self.prefix}.{key}")

    def wrong(self, key: str, allowed: str) -> FormatError:
        return FormatError(f"{self.prefix}.{key} is {_show(self.get(key))}, must be {allowed}")

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = _MAX_SIZE) -> int:
        """An integer, or an array with one for each layer that are all the same."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, np.ndarray) and value.ndim == 1 and value.size:
            if (value != value[0]).any():
                raise UnsupportedError(
                    f"{self.prefix}.{key} differs from layer to layer ({value.min()} to {value.max()}); "
                    "this program runs models with equal layers"
                )
            value = value[0].item()
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None, low: float = 0.0, high: float = 1e6) -> float:
        """A number from low to high."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.wrong(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def factor(self, key: str) -> float:
        """A number to multiply or divide by; 1 where it is missing or 0."""
        value = self.number(key, 1.0) or 1.0
        if value < 1e-6:
            raise self.wrong(key, "a number from 1e-06 to 1e+06")
        return value


def _read(arch: Architecture, keys: _Keys, tensors: Mapping[str, Tensor]) -> ModelConfig:
    for key, neutral in _NEUTRAL.items():
        value = keys.get(key)
        if value is not None and not (isinstance(value, int | float) and value == neutral):
            raise UnsupportedError(f"{arch.name}.{key} is {_show(value)}: this program does not have that yet")
    n_layer = keys.integer("block_count", high=_MAX_LAYERS)
    n_embd = keys.integer("embedding_length")
    n_head = keys.integer("attention.head_count")
    n_head_kv = keys.integer("attention.head_count_kv", n_head)
    if n_head % n_head_kv:
        raise keys.wrong("attention.head_count_kv", f"a divisor of {arch.name}.attention.head_count, which is {n_head}")
    head_dim = keys.integer("attention.key_length", n_embd // n_head)
    if keys.get("attention.key_length") is None and n_embd % n_head:
        raise keys.wrong("attention.head_count", f"a divisor of {arch.name}.embedding_length, which is {n_embd}")
    if keys.integer("attention.value_length", n_embd // n_head) != head_dim:
        raise keys.wrong("attention.value_length", f"the same as the length of a key, which is {head_dim}")
    n_rot = keys.integer("rope.dimension_count", head_dim)
    if n_rot % 2 or n_rot > head_dim:
        raise FormatError(
            f"{arch.name}.rope.dimension_count is {n_rot}, must be even and at most the length of a head, {head_dim}"
        )
    embd = tensors.get("token_embd.weight")
    if embd is None or len(embd.ne) != 2:
        raise FormatError(f"tensor token_embd.weight {_shape_of(embd)}, must have {n_embd} x (number of tokens) values")
    n_ctx_train = keys.integer("context_length")
    window = keys.integer("attention.sliding_window", 0, low=0)
    by_embd = n_layer in arch.n_embd_scale_n_layer
    n_expert = keys.integer("expert_count", 0, low=0, high=_MAX_EXPERTS)
    if bool(n_expert) not in {"no": (False,), "yes": (True,), "maybe": (False, True)}[arch.moe]:
        raise UnsupportedError(f"{arch.name}.expert_count is {n_expert}: this program does not have that yet")
    n_used = keys.integer("expert_used_count", high=n_expert) if n_expert else 0
    n_ff = keys.integer("feed_forward_length", keys.integer("expert_feed_forward_length", 0, low=0) or None)
    n_ff_exp = keys.integer("expert_feed_forward_length", n_ff) if n_expert else 0
    n_ff_shared = keys.integer("expert_shared_count", 0, low=0, high=_MAX_EXPERTS) * n_ff_exp
    residual_scale = keys.factor("residual_scale")
    eps = "attention.layer_norm_epsilon" if arch.layer_norm else "attention.layer_norm_rms_epsilon"
    base = keys.number("rope.freq_base", 1e4, low=2, high=1e12)
    head_scale: float = (n_embd // n_head if by_embd else head_dim) ** -0.5
    embd_scale = n_embd**0.5 if arch.scaled_embd else keys.factor("embedding_scale")
    return ModelConfig(
        arch=arch,
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=n_ff,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_rot=n_rot,
        n_vocab=embd.ne[1],
        n_ctx_train=n_ctx_train,
        rms_eps=keys.number(eps, high=1) / residual_scale**2,
        rope_freq_base=base,
        rope_freq_base_swa=keys.number("rope.freq_base_swa", arch.swa_rope_freq_base or base, low=2, high=1e12),
        rope_scaling=_rope_scaling(keys, n_ctx_train, arch.yarn_truncate),
        window=window,
        is_swa=_swa_layers(keys, n_layer, arch.swa_period) if window else (False,) * n_layer,
        attention_scale=keys.number("attention.scale", 0.0) or head_scale,
        attn_softcap=keys.number("attn_logit_softcapping", arch.attn_softcap),
        embd_scale=embd_scale / residual_scale,
        logit_scale=1 / keys.factor("logit_scale"),
        final_softcap=keys.number("final_logit_softcapping", arch.final_softcap),
        n_expert=n_expert,
        n_layer_dense_lead=keys.integer("leading_dense_block_count", 0, low=0, high=n_layer),
        n_ff_exp=n_ff_exp,
        n_ff_shexp=keys.integer("expert_shared_feed_forward_length", n_ff_shared, low=0) if n_expert else 0,
        moe=Moe(
            n_used,
            arch.expert_norm,
            keys.factor("expert_weights_scale"),
            arch.expert_activation or arch.activation,
        ),
    )


def _rope_scaling(keys: _Keys, n_ctx_train: int, yarn_truncate: bool) -> RopeScaling:
    """Read the rope.scaling keys; without a type a factor means linear scaling, as in files from before the type."""
    kind = keys.get("rope.scaling.type")
    if kind is not None and not (isinstance(kind, str) and kind in SCALING_TYPES):
        raise UnsupportedError(
            f"{keys.prefix}.rope.scaling.type is {_show(kind)}; this program runs: {', '.join(SCALING_TYPES)}"
        )
    old_key = keys.get("rope.scaling.factor") is None and keys.get("rope.scale_linear") is not None
    factor = keys.number("rope.scale_linear" if old_key else "rope.scaling.factor", 1.0)
    return RopeScaling(
        type=kind or "linear",
        factor=factor or 1.0,  # 0 stands for no scaling
        n_ctx_orig=keys.integer("rope.scaling.original_context_length", n_ctx_train),
        attn_factor=keys.number("rope.scaling.attn_factor", 1.0),
        ext_factor=keys.number("rope.scaling.yarn_ext_factor", 1.0, high=1),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0, low=0.001),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0, low=0.001),
        log_multiplier=keys.number("rope.scaling.yarn_log_multiplier", 0.0),
        truncate=yarn_truncate,
    )


def _swa_layers(keys: _Keys, n_layer: int, period: int) -> tuple[bool, ...]:
    """Which layers have the window: a list in the file, or all but every period-th; period 0: all."""
    pattern = keys.get("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        if pattern.shape != (n_layer,) or pattern.dtype.kind not in "biu":
            raise keys.wrong("attention.sliding_window_pattern", f"{n_layer} values of true or false, one for a layer")
        return tuple(bool(v) for v in pattern)
    period = keys.integer("attention.sliding_window_pattern", period, low=0, high=_MAX_LAYERS)
    return tuple(period == 0 or (il + 1) % period != 0 for il in range(n_layer))


def _size(ne: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes without those of 1 at the end, which files may leave out."""
    return ne if not ne or ne[-1] != 1 else _size(ne[:-1])


def _shape_of(tensor: Tensor | None) -> str:
    return "is missing" if tensor is None else f"has {' x '.join(map(str, tensor.ne))} values"


def _is_factor(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether it is what an NVFP4 matrix is multiplied by."""
    weight = tensors.get(f"{name.removesuffix('.scale')}.weight")
    return name.endswith(".scale") and weight is not None and weight.type.name == "NVFP4"


def _check_tensors(config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor that the decoder takes has the right shape, and none is there that it would silently leave out."""

    def check(name: str, shape: Shape) -> None:
        ne = tuple(sum(getattr(config, part) for part in size.split("+")) for size in shape)
        tensor = tensors.get(name)
        if tensor is None or _size(tensor.ne) != _size(ne):
            expected = " x ".join(map(str, ne))
            raise FormatError(
                f"tensor {name} {_shape_of(tensor)}, must have {expected} in this {config.arch.name} model"
            )

    required, optional = config.tensors(optional=False), config.tensors(optional=True)
    for name, shape in required.items():
        check(name, shape)
    for name in tensors:
        if name in optional:
            check(name, optional[name])
        elif name not in required and not name.endswith(_UNUSED_SUFFIXES) and not _is_factor(name, tensors):
            raise UnsupportedError(
                f"tensor {_show(name)} is not a part of a {config.arch.name} model of {config.n_layer} layers as this "
                "program knows it; without it the results would be wrong"
            )
    # One matrix of q, k, v, or of gate and up, needs one bias for all its rows or none.
    for il in range(config.n_layer):
        for group in (config.arch.qkv, config.ffn(il)[0], EXPERTS):
            biases = {f"blk.{il}.{name}.bias": f"blk.{il}.{name}.bias" in tensors for name in group}
            if any(biases.values()) and not all(biases.values()):
                missing = next(name for name, there in biases.items() if not there)
                raise UnsupportedError(f"tensor {missing} is missing, though other biases of its kind are there")
