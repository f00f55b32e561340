"""Reads the numbers of a model from GGUF metadata and tensor shapes, and checks all of them."""

from collections.abc import Mapping
from typing import Any

from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.frozen import frozen
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
from gguf_run.models.keys import MAX_LAYERS, Keys, rope_scaling, show, swa_layers
from gguf_run.models.operands import AttentionShape, Mixture
from gguf_run.models.rope import RopeScaling

_MAX_EXPERTS = 1024

# Features that the decoder does not have: the key, and the value with which a file says that it does not need them.
_NEUTRAL: Mapping[str, float | bool] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.temperature_scale": 0,
    "expert_group_count": 1,
    "expert_gating_func": 1,  # softmax
}
# Tensors that nobody reads: those that old converters wrote, and the scales of activations for NVFP4 products.
_UNUSED_SUFFIXES = (".attn_rot_embd.weight", ".rope_freqs.weight", ".input_scale")


@frozen
class ModelConfig:
    """Sizes and constants of one model, in ggml's names.

    In a model with a residual scale r, layers add r times their result to the residual stream. The decoder holds that
    stream divided by r instead. So embd_scale is divided by r here, and rms_eps by r^2; norms then give the same rows.
    """

    arch: Architecture
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int  # heads of queries
    n_head_kv: int  # heads of keys and values, each shared by n_head / n_head_kv heads of queries
    head_dim: int  # columns of a head
    n_rot: int  # columns of a head that are rotated
    n_vocab: int
    n_ctx_train: int
    rms_eps: float
    rope_freq_base: float
    rope_freq_base_swa: float  # of layers with a window
    rope_scaling: RopeScaling
    window: int  # positions that a layer with a window sees; 0: no layer has one
    is_swa: tuple[bool, ...]  # which layers have the window
    attention_scale: float  # factor on q.k
    attn_softcap: float
    embd_scale: float  # factor on the embeddings
    logit_scale: float  # factor on the logits
    final_softcap: float
    n_expert: int  # experts of a layer; 0: no layer has any
    n_layer_dense_lead: int  # number of first layers that have no experts
    n_ff_exp: int  # width of one expert
    n_ff_shexp: int  # width of the expert that all tokens use; 0: there is none
    moe: Mixture  # how a token's experts are chosen and weighted; unused if n_expert is 0

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

    def attention(self, il: int) -> AttentionShape:
        """Return the shape of layer il's attention."""
        window = self.window if self.is_swa[il] else 0
        return AttentionShape(
            self.n_head, self.n_head_kv, self.head_dim, self.attention_scale, window, self.attn_softcap
        )

    def has_rope(self, il: int) -> bool:
        """Whether layer il rotates q and k."""
        return not self.arch.no_rope_period or (il + 1) % self.arch.no_rope_period != 0

    def has_experts(self, il: int) -> bool:
        return bool(self.n_expert) and il >= self.n_layer_dense_lead

    def ffn(self, il: int) -> tuple[str, ...]:
        """Return the names of layer il's matrices of gate, up and down; () if the layer has only experts."""
        if not self.has_experts(il):
            return *self.arch.gate_up, "ffn_down"
        return SHARED if self.n_ff_shexp else ()

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "ModelConfig":
        """Read and check all numbers that the decoder relies on, and the shapes of all tensors.

        Raises FormatError for a key or tensor that is missing or wrong, and UnsupportedError for an architecture or a
        feature that this program does not have. The errors do not name the file.
        """
        name = metadata.get("general.architecture")
        if not isinstance(name, str):
            raise FormatError(f"general.architecture is {show(name)}, must be the name of an architecture")
        if name not in ARCHITECTURES:
            known = ", ".join(sorted(ARCHITECTURES))
            raise UnsupportedError(f"general.architecture is {show(name)}; this program runs: {known}")
        config = _read(ARCHITECTURES[name], Keys(metadata, name), tensors)
        _check_tensors(config, tensors)
        return config


def _read(arch: Architecture, keys: Keys, tensors: Mapping[str, Tensor]) -> ModelConfig:
    for key, neutral in _NEUTRAL.items():
        value = keys.get(key)
        if value is not None and not (isinstance(value, int | float) and value == neutral):
            raise UnsupportedError(f"{arch.name}.{key} is {show(value)}: this program does not have that yet")
    n_layer = keys.integer("block_count", high=MAX_LAYERS)
    n_embd = keys.integer("embedding_length")
    n_head, n_head_kv, head_dim, n_rot = _heads(keys, n_embd)
    n_ff, n_expert, n_ff_exp, n_ff_shexp, mixture = _ffn(arch, keys)
    embd = tensors.get("token_embd.weight")
    if embd is None or len(embd.ne) != 2:
        raise FormatError(f"tensor token_embd.weight {_shape_of(embd)}, must have {n_embd} x (number of tokens) values")
    n_ctx_train = keys.integer("context_length")
    window = keys.integer("attention.sliding_window", 0, low=0)
    residual_scale = keys.factor("residual_scale")
    eps = "attention.layer_norm_epsilon" if arch.layer_norm else "attention.layer_norm_rms_epsilon"
    base = keys.number("rope.freq_base", 1e4, low=2, high=1e12)
    head_scale: float = (n_embd // n_head if n_layer in arch.n_embd_scale_n_layer else head_dim) ** -0.5
    embd_scale = n_embd**0.5 if arch.scaled_embd else keys.factor("embedding_scale")
    return ModelConfig(
        arch=arch,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_rot=n_rot,
        n_vocab=embd.ne[1],
        n_ctx_train=n_ctx_train,
        rms_eps=keys.number(eps, high=1) / residual_scale**2,
        rope_freq_base=base,
        rope_freq_base_swa=keys.number("rope.freq_base_swa", arch.swa_rope_freq_base or base, low=2, high=1e12),
        rope_scaling=rope_scaling(keys, n_ctx_train, arch.yarn_truncate),
        window=window,
        is_swa=swa_layers(keys, n_layer, arch.swa_period) if window else (False,) * n_layer,
        attention_scale=keys.number("attention.scale", 0.0) or head_scale,
        attn_softcap=keys.number("attn_logit_softcapping", arch.attn_softcap),
        embd_scale=embd_scale / residual_scale,
        logit_scale=1 / keys.factor("logit_scale"),
        final_softcap=keys.number("final_logit_softcapping", arch.final_softcap),
        n_layer_dense_lead=keys.integer("leading_dense_block_count", 0, low=0, high=n_layer),
        n_ff=n_ff,
        n_expert=n_expert,
        n_ff_exp=n_ff_exp,
        n_ff_shexp=n_ff_shexp,
        moe=mixture,
    )


def _heads(keys: Keys, n_embd: int) -> tuple[int, int, int, int]:
    """Return n_head, n_head_kv, head_dim and n_rot."""
    n_head = keys.integer("attention.head_count")
    n_head_kv = keys.integer("attention.head_count_kv", n_head)
    if n_head % n_head_kv:
        allowed = f"a divisor of {keys.prefix}.attention.head_count, which is {n_head}"
        raise keys.wrong("attention.head_count_kv", allowed)
    head_dim = keys.integer("attention.key_length", n_embd // n_head)
    if keys.get("attention.key_length") is None and n_embd % n_head:
        raise keys.wrong("attention.head_count", f"a divisor of {keys.prefix}.embedding_length, which is {n_embd}")
    if keys.integer("attention.value_length", n_embd // n_head) != head_dim:
        raise keys.wrong("attention.value_length", f"the same as the length of a key, which is {head_dim}")
    n_rot = keys.integer("rope.dimension_count", head_dim)
    if n_rot % 2 or n_rot > head_dim:
        allowed = f"even and at most the length of a head, {head_dim}"
        raise FormatError(f"{keys.prefix}.rope.dimension_count is {n_rot}, must be {allowed}")
    return n_head, n_head_kv, head_dim, n_rot


def _ffn(arch: Architecture, keys: Keys) -> tuple[int, int, int, int, Mixture]:
    """Return n_ff, n_expert, n_ff_exp, n_ff_shexp, and how the experts are mixed."""
    n_expert = keys.integer("expert_count", 0, low=0, high=_MAX_EXPERTS)
    if bool(n_expert) not in {"no": (False,), "yes": (True,), "maybe": (False, True)}[arch.moe]:
        raise UnsupportedError(f"{arch.name}.expert_count is {n_expert}: this program does not have that yet")
    n_used = keys.integer("expert_used_count", high=n_expert) if n_expert else 0
    n_ff = keys.integer("feed_forward_length", keys.integer("expert_feed_forward_length", 0, low=0) or None)
    n_ff_exp = keys.integer("expert_feed_forward_length", n_ff) if n_expert else 0
    n_ff_shared = keys.integer("expert_shared_count", 0, low=0, high=_MAX_EXPERTS) * n_ff_exp
    scale, activation = keys.factor("expert_weights_scale"), arch.expert_activation or arch.activation
    norm = keys.flag("expert_weights_norm", arch.expert_norm)
    n_ff_shexp = keys.integer("expert_shared_feed_forward_length", n_ff_shared, low=0) if n_expert else 0
    return n_ff, n_expert, n_ff_exp, n_ff_shexp, Mixture(n_used, norm, scale, activation)


def _shape_of(tensor: Tensor | None) -> str:
    return "is missing" if tensor is None else f"has {' x '.join(map(str, tensor.ne))} values"


def _is_factor(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a tensor has the factors of an NVFP4 matrix."""
    weight = tensors.get(f"{name.removesuffix('.scale')}.weight")
    return name.endswith(".scale") and weight is not None and weight.type.name == "NVFP4"


def _shapes(config: ModelConfig) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Return the shapes of the tensors that a file must have, and of those that a file may leave out."""
    arch, shapes = config.arch, {**LAYER_SHAPES, **config.arch.shapes}
    required = {name: MODEL_SHAPES[name] for name in ("token_embd.weight", "output_norm.weight")}
    norm_bias = ("output_norm.bias",) if arch.layer_norm else ()
    optional = {name: MODEL_SHAPES[name] for name in ("output.weight", "output.bias", *norm_bias)}
    optional |= dict.fromkeys(ROPE_FACTORS, ("n_rope_freqs",))
    for il in range(config.n_layer):
        matrices = [*arch.qkv, "attn_output", *config.ffn(il)]
        if config.has_experts(il):
            matrices += ["ffn_gate_inp", *EXPERTS, *(["ffn_gate_inp_shexp"] if arch.shared_gate else [])]
        for name in (*arch.norms, *matrices, *(["attn_sinks"] if arch.sinks else [])):
            (optional if name in arch.optional_norms else required)[f"blk.{il}.{name}.weight"] = shapes[name]
        biased = (*arch.norms, *matrices) if arch.layer_norm else matrices
        optional |= {f"blk.{il}.{name}.bias": shapes[name][1:] or shapes[name] for name in biased}
    return required, optional


def _check_tensors(config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise an error if a tensor is missing, has a wrong shape, or would silently be left out."""
    required, optional = _shapes(config)
    for name, shape in (required | {name: shape for name, shape in optional.items() if name in tensors}).items():
        ne = tuple(sum(getattr(config, part) for part in size.split("+")) for size in shape)
        tensor = tensors.get(name)
        if tensor is None or not tensor.same_shape(ne):
            expected = f"{' x '.join(map(str, ne))} in this {config.arch.name} model"
            raise FormatError(f"tensor {name} {_shape_of(tensor)}, must have {expected}")
    for name in tensors:
        known = name in required or name in optional or name.endswith(_UNUSED_SUFFIXES)
        if not known and not _is_factor(name, tensors):
            raise UnsupportedError(
                f"tensor {show(name)} is not a part of a {config.arch.name} model of {config.n_layer} layers as this "
                "program knows it; without it the results would be wrong"
            )
    # q, k and v are one matrix, gate and up are one, too: all rows of a matrix have a bias or none has.
    for il in range(config.n_layer):
        for group in (config.arch.qkv, config.ffn(il)[:-1], EXPERTS):
            missing = [name for name in group if f"blk.{il}.{name}.bias" not in tensors]
            if 0 < len(missing) < len(group):
                name = f"blk.{il}.{missing[0]}.bias"
                raise UnsupportedError(f"tensor {name} is missing, though other biases of its kind are there")
