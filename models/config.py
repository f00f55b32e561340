"""Reads the numbers of a model from GGUF metadata and tensor shapes, and checks all of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.frozen import frozen
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models.architectures import QKV, Architecture, architecture
from gguf_run.models.keys import MAX_LAYERS, Keys, show
from gguf_run.models.operands import AttentionShape, RopeScaling
from gguf_run.models.tensor_check import check_tensors, shape_of, tensor_shapes

if TYPE_CHECKING:
    from gguf_run.models.mixers import Mixer
    from gguf_run.models.per_layer import AltUp
    from gguf_run.models.pooling import Pooling
    from gguf_run.models.routing import Mixture
    from gguf_run.models.temperature import Temperature


@frozen
class LayerConfig:
    """Sizes of one layer."""

    n_head: int  # heads of queries; 0: the layer has no attention
    n_head_kv: int  # heads of keys and values, each shared by n_head / n_head_kv heads of queries
    head_dim: int  # columns of a head
    n_rot: int  # columns of a head that are rotated; 0: none
    n_ff: int  # width of the ffn; 0: the layer has none
    window: int  # positions that a token sees, its own included; 0: all
    n_latent: int  # see operands.AttentionShape
    has_experts: bool
    kv_layer: int  # the layer whose keys and values this layer reads; its own if it makes any

    @property
    def n_embd_q(self) -> int:
        """Width of the queries of a token."""
        return self.n_head * self.head_dim

    @property
    def n_embd_kv(self) -> int:
        """Width of the keys, and of the values, of a token."""
        return self.n_head_kv * self.head_dim


class _Greatest:
    """A size of a model's layers: that of the layer where it is greatest."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, config: Any, owner: type) -> int:
        return max(getattr(layer, self._name) for layer in config.layers)


@frozen
class ModelConfig:
    """Sizes and constants of one model, in ggml's names.

    In a model with a residual scale r, layers add r times their result to the residual stream. The decoder holds that
    stream divided by r instead. So embd_scale is divided by r here, and rms_eps by r^2; norms then give the same rows.

    A size of a layer (LayerConfig) is that of the greatest layer here.
    """

    arch: Architecture
    layers: tuple[LayerConfig, ...]
    mixer: "Mixer | None"  # what layers have in place of attention, or beside it
    n_embd: int
    n_vocab: int
    n_ctx_train: int
    rms_eps: float  # of norms of the residual stream
    inner_eps: float  # of other norms
    rope_freq_base: float
    rope_freq_base_swa: float  # of layers with a window
    rope_scaling: RopeScaling
    attention_scale: float  # factor on q.k
    attn_softcap: float
    xielu: tuple[tuple[float, ...], ...]  # alpha_p, alpha_n, beta and eps of each layer's rare_ops.Xielu, if it has one
    temperature: "Temperature | None"  # of the queries of layers that do not rotate, if arch has one, or of all layers
    embd_scale: float  # factor on the embeddings
    logit_scale: float  # factor on the logits
    final_softcap: float
    n_expert: int  # experts of a layer; 0: no layer has any
    n_ff_exp: int  # width of one expert
    n_ff_shexp: int  # width of the expert that all tokens use; 0: there is none
    moe: "Mixture | None"  # how a token's experts are chosen and weighted, if there are any
    n_ple: int  # columns of the embedding that a token has for each layer; 0: there is none
    altup: "AltUp | None"  # of models with several streams of hidden states
    pooling: "Pooling | None"  # of models that make embeddings

    n_head, n_head_kv, head_dim, n_rot = _Greatest(), _Greatest(), _Greatest(), _Greatest()
    n_ff, n_embd_q, n_embd_kv, window = _Greatest(), _Greatest(), _Greatest(), _Greatest()

    @property
    def n_layer(self) -> int:
        return len(self.layers)

    @property
    def n_own(self) -> int:
        """Layers up to the last one that has keys and values, or a state, of its own. Later ones read what is there.

        With experts, which may be on another device, these are all layers.
        """
        return self.n_layer if self.n_expert else 1 + max(layer.kv_layer for layer in self.layers)

    @property
    def has_ple(self) -> bool:
        return self.n_ple > 0

    @property
    def n_rope_freqs(self) -> int:
        """Pairs of dimensions that are rotated."""
        return self.n_rot // 2

    def attention(self, il: int) -> AttentionShape:
        """Return the shape of layer il's attention. It has no heads in a layer without attention."""
        layer, scale, softcap = self.layers[il], self.attention_scale, self.attn_softcap
        sizes, is_chunked = (layer.n_head, layer.n_head_kv, layer.head_dim), min(self.arch.chunk, layer.window) > 0
        return AttentionShape(*sizes, scale, layer.window, softcap, is_chunked, layer.n_latent, self.arch.is_causal)

    def ffn(self, il: int) -> tuple[str, ...]:
        """Return the names of layer il's matrices of gate, up and down; () if the layer has only experts."""
        if self.layers[il].has_experts and not self.arch.dense_beside:
            return _late("experts").SHARED[not self.arch.gated :] if self.n_ff_shexp else ()
        return (*self.arch.gate_up, "ffn_down") if self.layers[il].n_ff else ()

    def size(self, il: int, word: str) -> int:
        """Return a size by its name in a table of shapes."""
        holders, total = (self.layers[il], self, self.altup), 0
        for part in word.split("+"):
            values = (
                [getattr(one, name) for one in holders if hasattr(one, name)] or [name] for name in part.split("*")
            )
            total += math.prod(int(value) for value, *_ in values)
        return total

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "ModelConfig":
        """Read and check all numbers that the decoder relies on, and the shapes of all tensors.

        Raises FormatError for a key or tensor that is missing or wrong, and UnsupportedError for an architecture or a
        feature that this program does not have. The errors do not name the file.
        """
        name = metadata.get("general.architecture")
        if not isinstance(name, str):
            raise FormatError(f"general.architecture is {show(name)}, must be the name of an architecture")
        try:
            arch = architecture(name)
        except KeyError:
            known = _late("nearest").nearest(
                lambda arch: tensor_shapes(read_sizes(arch, Keys(metadata, name), tensors), tensors), tensors
            )
            raise UnsupportedError(f"general.architecture is {show(name)}, which is not known; {known}") from None
        config = read_sizes(arch, Keys(metadata, name), tensors)
        blocks = [f"blk.{il}." for il in range(config.n_layer)]
        of_experts = _late("experts").experts_of if config.n_expert else lambda *_: ()
        groups = [(QKV, config.ffn(il)[:-1], of_experts(arch, block, tensors)) for il, block in enumerate(blocks)]
        check_tensors(Keys(metadata, name), tensors, *tensor_shapes(config, tensors), groups)
        return config


def read_sizes(arch: Architecture, keys: Keys, tensors: Mapping[str, Tensor]) -> ModelConfig:
    """Return the numbers of a model. Of the tensors, only those whose sizes tell a number are needed."""
    if clamp := keys.number("attention.clamp_kqv", 0.0):
        raise UnsupportedError(f"{arch.name}.attention.clamp_kqv is {clamp}: this program does not have that yet")
    arch = replace(arch, is_causal=keys.flag("attention.causal", arch.is_causal))
    if arch.neox_by_sections and any(keys.integers("rope.dimension_sections", 4, (0,), low=0)):
        arch = replace(arch, rope_style="neox")
    n_embd = keys.integer("embedding_length")
    n_expert, n_ff_exp, n_ff_shexp, mixture = _experts(arch, keys, tensors)
    if n_expert and n_expert == arch.no_qk_norm_n_expert:
        arch = replace(arch, qk_norm_after_rope=False)
    mixer, keys = _mixer(arch, keys)
    layers = _layers(arch, keys, n_embd, bool(n_expert), mixer)
    embd = tensors.get("token_embd.weight")
    if embd is None or len(embd.ne) != 2:
        raise FormatError(f"tensor token_embd.weight {shape_of(embd)}, must have {n_embd} x (number of tokens) values")
    n_ctx_train = keys.integer("context_length")
    residual_scale = keys.factor("residual_scale")
    eps, other = (f"attention.layer_norm_{kind}" for kind in ("rms_epsilon", "epsilon")[:: 1 - 2 * arch.layer_norm])
    if keys.get(eps) is None and keys.get(other) is not None:
        eps = other
    base = keys.number("rope.freq_base", 1e4, low=2, high=1e12)
    if alpha := keys.number("rope.scaling.alpha", 0.0):
        base *= alpha ** (layers[0].head_dim / max(1, layers[0].head_dim - 2))
    is_per_embd = len(layers) in arch.n_embd_scale_n_layer
    head_scale: float = (n_embd // layers[0].n_head if is_per_embd else layers[0].head_dim) ** -0.5
    rms_eps = keys.number(eps, high=1)
    embeds = not arch.is_causal or keys.get("pooling_type") is not None
    embd_scale = n_embd**0.5 if arch.scaled_embd else keys.factor("embedding_scale")
    return ModelConfig(
        arch=arch,
        layers=layers,
        mixer=mixer,
        n_embd=n_embd,
        n_vocab=embd.ne[1],
        n_ctx_train=n_ctx_train,
        rms_eps=rms_eps / residual_scale**2,
        inner_eps=rms_eps,
        rope_freq_base=base,
        rope_freq_base_swa=keys.number("rope.freq_base_swa", arch.swa_rope_freq_base or base, low=2, high=1e12),
        rope_scaling=_late("rope_scaling").read_scaling(keys, n_ctx_train, arch.yarn_truncate)
        if any(key.startswith(f"{keys.prefix}.rope.scal") for key in keys.metadata)
        else RopeScaling("linear", n_ctx_orig=n_ctx_train),
        attention_scale=keys.number("attention.scale", arch.attention_scale) or head_scale,
        attn_softcap=keys.number("attn_logit_softcapping", arch.attn_softcap),
        xielu=_late("xielu").read_xielu(keys, len(layers)) if arch.activation == "xielu" else (),
        temperature=_late("temperature").read_temperature(keys, arch.temperature)
        if arch.temperature or keys.get("attention.temperature_scale") is not None
        else None,
        embd_scale=embd_scale / residual_scale,
        logit_scale=keys.factor("logit_scale") ** (1 if arch.logits_multiplied else -1),
        final_softcap=keys.number("final_logit_softcapping", arch.final_softcap),
        n_expert=n_expert,
        n_ff_exp=n_ff_exp,
        n_ff_shexp=n_ff_shexp,
        moe=mixture,
        n_ple=keys.integer("embedding_length_per_layer_input", 0, low=0),
        altup=_late("per_layer").read_altup(keys, tensors, len(layers)) if arch.step == "altup_step" else None,
        pooling=_late("pooling").read_pooling(arch, keys, tensors) if embeds else None,
    )


def _late(name: str) -> Any:
    """Return a module of models that few architectures need."""
    return import_module(f"gguf_run.models.{name}")


def _mixer(arch: Architecture, keys: Keys) -> "tuple[Mixer | None, Keys]":
    """Return what layers have in place of attention, and the keys that all else is read from."""
    if not arch.mixer:
        return None, keys
    module = _late(f"mixers.{arch.mixer}")
    mixer: Mixer = module.read(keys)
    return mixer, module.as_one_head(keys, mixer) if arch.mixer == "latent" else keys


def _head(keys: Keys, end: str, default: int, default_rot: int) -> tuple[int, int]:
    """Return head_dim and n_rot: of all layers, or with the end "_swa", of layers with a window."""
    head_dim = keys.integer(f"attention.key_length{end}", default)
    if keys.integer(f"attention.value_length{end}", default) != head_dim:
        raise keys.wrong(f"attention.value_length{end}", f"the same as the length of a key, which is {head_dim}")
    n_rot = keys.integer(f"rope.dimension_count{end}", default_rot if head_dim == default else head_dim)
    if n_rot % 2 or n_rot > head_dim:
        allowed = f"even and at most the length of a head, {head_dim}"
        raise FormatError(f"{keys.prefix}.rope.dimension_count{end} is {n_rot}, must be {allowed}")
    return head_dim, n_rot


def _layers(
    arch: Architecture, keys: Keys, n_embd: int, has_experts: bool, mixer: "Mixer | None"
) -> tuple[LayerConfig, ...]:
    """Return the sizes of the layers. `nextn_predict_layers` blocks at the end of the file draft tokens: left out."""
    n_block = keys.integer("block_count", high=MAX_LAYERS)
    n_layer = n_block - keys.integer("nextn_predict_layers", 0, low=0, high=n_block - 1)
    n_head = keys.integers("attention.head_count", n_block)
    n_head_kv = keys.integers("attention.head_count_kv", n_block, n_head, low=0 if arch.mixer else 1)
    for il in range(n_layer):
        if n_head_kv[il] and n_head[il] % n_head_kv[il]:
            allowed = f"a divisor of {keys.prefix}.attention.head_count, which is {n_head[il]}"
            raise keys.wrong("attention.head_count_kv", allowed)
    if keys.get("attention.key_length") is None and n_embd % n_head[0]:
        raise keys.wrong("attention.head_count", f"a divisor of {keys.prefix}.embedding_length, which is {n_embd}")
    heads = _head(keys, "", n_embd // n_head[0], n_embd // n_head[0])
    heads_swa = _head(keys, "_swa", *heads)
    n_ff_exp = keys.integer("expert_feed_forward_length", 0, low=0)
    n_ff = keys.integers(
        "feed_forward_length", n_block, [n_ff_exp] * n_block if n_ff_exp else None, int(not arch.mixer)
    )
    n_lead = keys.integer("leading_dense_block_count", 0, low=0, high=n_block)
    moe_step = keys.integer("interleave_moe_layer_step", 1)
    window = keys.integer("attention.sliding_window", arch.chunk, low=int(arch.chunk > 0))
    window = window if arch.is_causal or not window else window // 2 + 1  # the same to both sides
    is_swa = _late("per_layer").swa_layers(keys, n_block, arch.swa_period) if window else (False,) * n_block
    n_latent = keys.integer("attention.kv_lora_rank") if arch.mixer == "latent" else 0
    kv_layers: Sequence[int] = range(n_layer)
    if keys.get("attention.shared_kv_layers"):
        kv_layers = _late("per_layer").kv_layers_of(keys, list(zip(is_swa, n_head_kv, strict=True))[:n_layer])
    turns = not arch.rope_key or keys.flag(arch.rope_key, True)
    layers = []
    for il in range(n_layer):
        attends = mixer is None or mixer.attends(il)
        is_rotated = turns and (not arch.no_rope_period or (il + 1) % arch.no_rope_period != 0)
        is_rotated = is_rotated and (is_swa[il] or not (arch.window_rope and window))
        head_dim, n_rot = heads_swa if is_swa[il] else heads
        layers.append(
            LayerConfig(
                n_head=n_head[il] if attends else 0,
                n_head_kv=n_head_kv[il] if attends else 0,
                head_dim=head_dim,
                n_rot=n_rot if is_rotated else 0,
                n_ff=n_ff[il],
                window=window if is_swa[il] and attends else 0,
                n_latent=n_latent,
                has_experts=has_experts and il >= n_lead and (il + 1) % moe_step == 0 and n_ff[il] > 0,
                kv_layer=kv_layers[il],
            )
        )
    return tuple(layers)


def _experts(arch: Architecture, keys: Keys, tensors: Mapping[str, Tensor]) -> "tuple[int, int, int, Mixture | None]":
    """Return n_expert, n_ff_exp, n_ff_shexp, and how the experts are mixed."""
    n_expert = keys.integer("expert_count", 0, low=0, high=1024)
    if not n_expert and arch.moe != "yes":
        return 0, 0, 0, None
    return cast("tuple[int, int, int, Mixture | None]", _late("routing").read_mixture(arch, keys, tensors, n_expert))
