"""Checkpoints whose layers have a short convolution or Mamba 2 in place of attention, or beside it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.runtime.convert import shared
from gguf_run.runtime.convert.layout import CheckpointLayout
from gguf_run.runtime.convert.layouts.dense import GRANITE_KEYS
from gguf_run.runtime.convert.shared import Key, Names, network
from gguf_run.runtime.convert.stored.checkpoint import Config
from gguf_run.runtime.convert.stored.sources import computed, gathered, rows, values

# Names of the kinds of layers in config.json: by classes of transformers, old and new, and by Nemotron-H's letters.
_ATTENTION = ("attention", "full_attention", "*")
_MIXER = ("conv", "mamba", "linear_attention", "M")
_FFN = ("mlp", "moe", "-", "E")
# What `read` and `edit` look up below.
_LOOKED_UP = dict.fromkeys((
    "layer_types", "layers_block_type", "hybrid_override_pattern", "position_embedding_type", "attention_head_dim",
    "shared_intermediate_size", "mamba_expand", "mamba_d_head", "mamba_head_dim", "mamba_d_ssm", "mamba_rms_norm",
    "mamba_norm_before_gate", "mlp_multipliers", "ssm_multipliers",
))  # fmt: skip
_FIXED = {
    "mamba_hidden_act": ("silu",), "mamba_conv_bias": (True,), "use_conv_bias": (True,), "use_bias": (False,),
    "mamba_proj_bias": (False,), "projectors_bias": (False,), "attention_bias": (False,), "mlp_bias": (False,),
    "time_step_limit": ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}]),  # transformers 5 writes the second
}  # fmt: skip
_SSM_KEYS: tuple[Key, ...] = (
    ("ssm.conv_kernel", "u32", ("mamba_d_conv", "conv_kernel")),
    ("ssm.state_size", "u32", ("mamba_d_state", "ssm_state_size")),
    ("ssm.group_count", "u32", ("mamba_n_groups", "n_groups")),
    ("ssm.inner_size", "u32", ("_n_inner",)),
    ("ssm.time_step_rank", "u32", ("mamba_n_heads", "mamba_num_heads")),
)
_KV: Key = ("attention.head_count_kv", "array[i32]", ("_n_head_kv",))


def _mamba(module: str) -> Names:
    parts = ("in_proj", "conv1d", "dt", "A_log", "D", "norm", "out_proj")
    names = ("in", "conv1d", "dt", "a", "d", "norm", "out")
    return {f"{module}.{part}": f"ssm_{name}" for part, name in zip(parts, names, strict=True)}


def _kinds(config: Config, *names: str) -> list[str]:
    """Return the kind of each layer, from a list or from a text with one letter for each layer."""
    kinds, known = config.get(*names), (*_ATTENTION, *_MIXER, *_FFN)
    if not isinstance(kinds, list | str) or not kinds or any(kind not in known for kind in kinds):
        raise config.wrong(names, f"a list of kinds of layers: {', '.join(known)}")
    return list(kinds)


def _with_kinds(config: Config, kinds: list[str], **more: Any) -> Config:
    """Return the config with the numbers of key heads of the layers, and more values."""
    n_head_kv = config.integer("num_key_value_heads", default=config.integer("num_attention_heads"))
    heads = [n_head_kv if kind in _ATTENTION else 0 for kind in kinds]
    return config.plus(num_hidden_layers=len(kinds), _n_head_kv=heads, **more)


def _without(keys: tuple[Key, ...]) -> dict[str, None]:
    """Return empty values for keys of config.json that the model has no use for: transformers writes them anyway."""
    return {name: None for _, _, names in keys for name in names}


def _lfm2(layout: CheckpointLayout, config: Config) -> tuple[CheckpointLayout, Config]:
    if config.get("layer_types") is None and isinstance(full := config.get("full_attn_idxs"), list):
        kinds = ["attention" if i in full else "conv" for i in range(config.integer("num_hidden_layers"))]
    else:
        kinds = _kinds(config, "layer_types")
    n_ff = config.integer("block_ff_dim", "intermediate_size")
    if config.get("block_auto_adjust_ff_dim") is True:
        n, n_ff = config.integer("block_multiple_of"), int(config.number("block_ffn_dim_multiplier") * (2 * n_ff // 3))
        n_ff = -(-n_ff // n) * n
    return layout, _with_kinds(config, kinds, intermediate_size=n_ff, _gating=2)


def _granite(layout: CheckpointLayout, config: Config) -> tuple[CheckpointLayout, Config]:
    """A checkpoint without experts has the shared one as its ffn, one without Mamba is a granite or a granitemoe."""
    kinds = _kinds(config, "layer_types")
    n_inner = config.integer("mamba_expand") * config.integer("hidden_size")
    n_ff, n_expert = config.integer("shared_intermediate_size", low=0), config.integer("num_local_experts", low=0)
    more: dict[str, Any] = {"_n_inner": n_inner, "shared_expert_intermediate_size": n_ff}
    if not n_expert:
        more |= {"intermediate_size": n_ff, "shared_expert_intermediate_size": None, "num_experts_per_tok": 0}
        shared: Names = {"shared_mlp.input_linear": ("ffn_gate", "ffn_up"), "shared_mlp.output_linear": "ffn_down"}
        layout = replace(layout, layer={**layout.layer, **shared})
    turns = config.get("position_embedding_type") == "rope"
    if all(kind in _ATTENTION for kind in kinds) and turns:
        layout = replace(layout, arch="granitemoe" if n_expert else "granite", keys=GRANITE_KEYS)
        more |= _without(_SSM_KEYS)
    return layout, _with_kinds(config, kinds, _is_rotated=turns, **more)


def _nemotron(layout: CheckpointLayout, config: Config) -> tuple[CheckpointLayout, Config]:
    kinds = _kinds(config, "layers_block_type", "hybrid_override_pattern")
    has_experts = any(kind in ("moe", "E") for kind in kinds)
    n_ff = config.integer("moe_intermediate_size" if has_experts else "intermediate_size")
    n_inner = config.integer("mamba_num_heads") * config.integer("mamba_head_dim")
    widths = [n_ff if kind in _FFN else 0 for kind in kinds]
    head_dim = config.integer("attention_head_dim", "head_dim")
    more: dict[str, Any] = {"_n_ff": widths, "_n_inner": n_inner, "head_dim": head_dim, "intermediate_size": n_ff}
    if not has_experts:
        more |= dict.fromkeys(("n_routed_experts", "num_experts_per_tok"))
        more |= _without((*shared.EXPERT_KEYS, *_NEMOTRON_MOE_KEYS))
    elif any(kind in ("mlp", "-") for kind in kinds):
        raise config.wrong(("layers_block_type",), "one kind of feed-forward layers: mlp or moe")
    else:
        layout = replace(layout, arch="nemotron_h_moe", keys=(*layout.keys, *_NEMOTRON_MOE_KEYS))
    return layout, _with_kinds(config, kinds, **more)


def _falcon(layout: CheckpointLayout, config: Config) -> tuple[CheckpointLayout, Config]:
    if config.get("mamba_rms_norm") is True and config.get("mamba_norm_before_gate") is not False:
        raise config.unsupported("mamba_norm_before_gate", "false")
    more: dict[str, Any] = {"_n_inner": config.integer("mamba_d_ssm")}
    for names, n in (("mlp_multipliers", 2), ("ssm_multipliers", 5)):
        factors = config.get(names) or [1.0] * n
        if not isinstance(factors, list) or len(factors) != n or not all(type(f) in (int, float) for f in factors):
            raise config.wrong((names,), f"{n} numbers")
        more[names] = factors
    return layout, config.plus(**more)


def _states(config: Config, name: str, tensor: Tensor) -> Tensor:
    """Return tensors of Mamba 2 and of convolutions in GGUF's form."""
    base = name.split(".")[-2]
    if base in ("ssm_conv1d", "conv") and len(tensor.ne) == 3:
        return values(replace(tensor, ne=(tensor.ne[0], tensor.ne[2])))
    if base not in ("ssm_a", "ssm_d", "ssm_norm"):
        return tensor
    x = dequantize(tensor.blocks(), tensor.type)
    n_group = config.integer("mamba_n_groups", "n_groups") if base == "ssm_norm" else x.size
    if x.size % n_group:
        raise config.wrong(("mamba_n_groups", "n_groups"), f"a divisor of {x.size}")
    return computed(name, (-np.exp(x) if base == "ssm_a" else x).reshape(n_group, -1), tensor.file.path)


# Names in config.json of the factors on the rows of a tensor.
_MULTIPLIERS: Mapping[str, tuple[str, ...]] = {
    "token_embd": ("embedding_multiplier",), "output": ("lm_head_multiplier",), "attn_q": ("attention_in_multiplier",),
    "attn_k": ("attention_in_multiplier", "key_multiplier"), "attn_v": ("attention_in_multiplier",),
    "attn_output": ("attention_out_multiplier",), "ssm_in": ("ssm_in_multiplier",), "ssm_out": ("ssm_out_multiplier",),
}  # fmt: skip


def _folded(config: Config, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of Falcon-H1 times its multipliers, which a GGUF file has no place for."""
    base = name.split(".")[-2]
    tensor = _states(config, name, tensor)
    factor = float(np.prod([config.number(key) for key in _MULTIPLIERS.get(base, ())]))
    if base in ("ffn_gate", "ffn_down"):
        factor = config.get("mlp_multipliers")[base == "ffn_down"]
    if base != "ssm_in":
        return _times(tensor, factor)
    n_inner, n_bc = config.integer("_n_inner"), config.integer("mamba_n_groups") * config.integer("mamba_d_state")
    widths = (n_inner, n_inner, n_bc, n_bc, config.integer("mamba_n_heads"))
    if tensor.n_rows != sum(widths):
        raise config.wrong(("mamba_d_ssm",), f"a size of which {name} has {tensor.n_rows} rows")
    parts, at = [], 0
    for n, part in zip(widths, config.get("ssm_multipliers"), strict=True):
        some = rows(tensor, np.arange(at, at + n, dtype=np.int64), (tensor.ne[0], n))
        parts.append(_times(some, factor * part))
        at += n
    return gathered(name, parts, None, tensor.ne)


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else values(tensor, lambda x: x * np.float32(factor))


_LFM2 = CheckpointLayout(
    "lfm2", {"Lfm2ForCausalLM": "lfm2"},
    model={"model.embed_tokens": "token_embd", "model.embedding_norm": "token_embd_norm", "lm_head": "output"},
    layer={
        "operator_norm": "attn_norm", "ffn_norm": "ffn_norm",
        **{f"conv.{name}": f"shortconv.{name}" for name in ("in_proj", "conv", "out_proj")}, **shared.ATTENTION,
        "self_attn.out_proj": "attn_output", "self_attn.q_layernorm": "attn_q_norm",
        "self_attn.k_layernorm": "attn_k_norm", **network("feed_forward", words=shared.NUMBERED),
    },
    keys=(
        shared.VOCAB_SIZE, _KV, ("shortconv.l_cache", "u32", ("conv_L_cache",)),
        ("attention.layer_norm_rms_epsilon", "f32", ("norm_eps",)),
    ),
    read=_lfm2, edit=_states,
    defaults={
        "tie_word_embeddings": True, "rope_theta": 1e6, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True, "full_attn_idxs": None, "layer_types": None, "block_ff_dim": None,
        "rms_norm_eps": None,
    },
    expected={"conv_bias": (False,)},
)  # fmt: skip
_LFM2_MOE = replace(
    _LFM2, arch="lfm2moe", classes={"Lfm2MoeForCausalLM": "lfm2_moe"},
    layer={
        **_LFM2.layer, **network("feed_forward.experts.@", "_exps", shared.NUMBERED),
        "feed_forward.gate": "ffn_gate_inp", "feed_forward.expert": "exp_probs_b",  # expert_bias in the checkpoint
    },
    keys=(
        *_LFM2.keys, shared.N_EXPERT, ("leading_dense_block_count", "u32", ("num_dense_layers",)),
        ("expert_gating_func", "u32", ("_gating",)),  # sigmoid
        ("expert_weights_scale", "f32", ("routed_scaling_factor",)),
    ),
    defaults={**_LFM2.defaults, "block_auto_adjust_ff_dim": False},
    expected={**_LFM2.expected, "norm_topk_prob": (True,), "use_expert_bias": (True, False)},
)  # fmt: skip
_GRANITE = CheckpointLayout(
    "granitehybrid", {"GraniteMoeHybridForCausalLM": "granitemoehybrid"},
    layer={
        **shared.PRE_NORMS, **shared.ATTENTION, **_mamba("mamba"), "block_sparse_moe.router.layer": "ffn_gate_inp",
        "block_sparse_moe.input_linear": ("ffn_gate_exps", "ffn_up_exps"),
        "block_sparse_moe.output_linear": "ffn_down_exps",
        "shared_mlp.input_linear": ("ffn_gate_shexp", "ffn_up_shexp"), "shared_mlp.output_linear": "ffn_down_shexp",
    },
    permuted=True, keys=(*GRANITE_KEYS, _KV, *_SSM_KEYS, ("rope.scaling.finetuned", "bool", ("_is_rotated",))),
    read=_granite, edit=_states, defaults={**_LOOKED_UP, "attention_multiplier": 1.0}, expected=_FIXED,
)  # fmt: skip
_NEMOTRON = CheckpointLayout(
    "nemotron_h", {"NemotronHForCausalLM": "nemotron_h"},
    model={"model.embeddings": "token_embd", "model.norm_f": "output_norm", "lm_head": "output"},
    layer={
        "norm": "attn_norm", **_mamba("mixer"), **{f"mixer.{name}_proj": f"attn_{name}" for name in "qkv"},
        "mixer.o_proj": "attn_output", **{f"mixer.{name}_proj": f"ffn_{name}" for name in ("up", "down")},
        **{f"mixer.shared_experts.{name}_proj": f"ffn_{name}_shexp" for name in ("up", "down")},
        **{f"mixer.experts.@.{name}_proj": f"ffn_{name}_exps" for name in ("up", "down")}, "mixer.gate": "ffn_gate_inp",
        "mixer.gate.e_score_correction": "exp_probs_b",
    },
    keys=(
        shared.VOCAB_SIZE, _KV, ("feed_forward_length", "array[i32]", ("_n_ff",)),
        ("attention.layer_norm_rms_epsilon", "f32", ("layer_norm_epsilon",)),
        ("attention.layer_norm_epsilon", "f32", ("layer_norm_epsilon",)),  # llama.cpp asks for both
        *_SSM_KEYS,
    ),
    read=_nemotron, edit=_states, defaults={**_LOOKED_UP, "rms_norm_eps": None},
    expected={
        **_FIXED, "mlp_hidden_act": ("relu2",), "sliding_window": (None,), "moe_latent_size": (None,), "n_group": (1,),
        "topk_group": (1,), "num_nextn_predict_layers": (0,),
    },
)  # fmt: skip
_NEMOTRON_MOE_KEYS: tuple[Key, ...] = (
    ("expert_shared_feed_forward_length", "u32", ("moe_shared_expert_intermediate_size",)),
    ("expert_weights_norm", "bool", ("norm_topk_prob",)),
    ("expert_weights_scale", "f32", ("routed_scaling_factor",)),
)
_FALCON = CheckpointLayout(
    "falcon-h1", {"FalconH1ForCausalLM": "falcon_h1"},
    model={"model.embed_tokens": "token_embd", "model.final_layernorm": "output_norm", "lm_head": "output"},
    layer={
        "input_layernorm": "attn_norm", "pre_ff_layernorm": "ffn_norm", **shared.ATTENTION, **_mamba("mamba"),
        **network("feed_forward"),
    },
    tied_copy=True,  # the multipliers of the embeddings and of the output differ
    keys=(shared.VOCAB_SIZE, *_SSM_KEYS), read=_falcon, edit=_folded,
    defaults={**_LOOKED_UP, **{key: 1.0 for keys in _MULTIPLIERS.values() for key in keys}}, expected=_FIXED,
)  # fmt: skip
ROWS = (_LFM2, _LFM2_MOE, _GRANITE, _NEMOTRON, _FALCON)
