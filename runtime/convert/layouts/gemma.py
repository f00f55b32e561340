"""Checkpoints of the Gemma models."""

import math
from collections.abc import Iterator
from dataclasses import replace
from statistics import NormalDist

from gguf_run.formats.gguf.metadata import Typed
from gguf_run.runtime.convert import shared
from gguf_run.runtime.convert.layout import CheckpointLayout
from gguf_run.runtime.convert.shared import Key, Names
from gguf_run.runtime.convert.stored.checkpoint import Config

GEMMA2_NORMS: Names = {**shared.PRE_NORMS, **shared.POST_NORMS, "pre_feedforward_layernorm": "ffn_norm"}
CAPS: tuple[Key, ...] = (
    ("attn_logit_softcapping", "f32", ("attn_logit_softcapping",)),
    ("final_logit_softcapping", "f32", ("final_logit_softcapping",)),
)  # fmt: skip
# The first files say "gelu" by mistake: they mean the other one. Gemma 2 and 3 have both keys.
GEMMA_FIXED = {"hidden_activation": ("gelu_pytorch_tanh",), "hidden_act": ("gelu_pytorch_tanh", "gelu")}
GEMMA = {"head_dim": 256, "tie_word_embeddings": True}
GEMMA2 = {**GEMMA, "sliding_window": 4096, "query_pre_attn_scalar": 256}
# The first files of Gemma 3 leave out values that are the defaults of the class.
GEMMA3 = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072}
PER_LAYER: Names = {
    "per_layer_input_gate": "inp_gate", "per_layer_projection": "proj", "post_per_layer_input_norm": "post_norm",
}  # fmt: skip
PER_LAYER_MODEL: Names = {
    **shared.MODEL, "model.embed_tokens_per_layer": "per_layer_token_embd",
    "model.per_layer_model_projection": "per_layer_model_proj",
    "model.per_layer_projection_norm": "per_layer_proj_norm",
}  # fmt: skip
SHARED_KV: tuple[Key, ...] = (
    ("attention.shared_kv_layers", "u32", ("num_kv_shared_layers",)),
    ("embedding_length_per_layer_input", "u32", ("hidden_size_per_layer_input",)),
)  # fmt: skip
GEMMA4_EXPERTS: Names = {
    "router": "ffn_gate_inp",  # its scale
    "router.proj": "ffn_gate_inp", "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps", "experts.down_proj": "ffn_down_exps",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2", "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "post_feedforward_layernorm_2": "post_ffw_norm_2",
}  # fmt: skip
GEMMA4 = {
    **GEMMA, "sliding_window": 512, "num_key_value_heads": 4, "final_logit_softcapping": 30.0, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072, "global_head_dim": 512, "num_global_key_value_heads": None,
    "per_layer_config": None, "attention_k_eq_v": False, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262144, "enable_moe_block": False, "use_double_wide_mlp": False,
    "sliding_window_pattern": 6, "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip


def gemma4_keys(config: Config, windows: list[bool]) -> Iterator[tuple[str, Typed]]:
    """Yield the sizes that layers with a window and those without have. windows: which layers have one."""
    n_head_kv, head_dim = config.integer("num_key_value_heads"), config.integer("head_dim")
    overrides = config.get("per_layer_config")
    if not isinstance(overrides, dict):  # files that transformers did not write
        is_other = config.get("attention_k_eq_v") and config.get("num_global_key_value_heads") is not None
        full = {"head_dim": config.integer("global_head_dim")}
        full |= {"num_key_value_heads": config.integer("num_global_key_value_heads")} if is_other else {}
        overrides = {str(il): full for il, window in enumerate(windows) if not window}
    overrides = {key.lstrip("0") or "0": values for key, values in overrides.items()}  # "07" with more than 10 layers
    layers = [Config(config.path, overrides.get(str(il)) or {}) for il in range(len(windows))]
    pairs = [(w, layer.integer("head_dim", default=head_dim)) for layer, w in zip(layers, windows, strict=True)]
    for end, is_swa in (("", False), ("_swa", True)):
        n, *others = {dim for w, dim in pairs if w is is_swa} or {head_dim}
        if others:
            raise config.wrong(("per_layer_config",), "one head_dim for layers with a window, one for the others")
        for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            yield f"{name}{end}", Typed("u32", n)
    heads = [layer.integer("num_key_value_heads", default=n_head_kv) for layer in layers]
    yield "attention.head_count_kv", Typed("array[i32]", heads) if len({*heads}) > 1 else Typed("u32", heads[0])
    if config.get("use_double_wide_mlp") and (n_shared := config.integer("num_kv_shared_layers", low=0)):
        n_ff, n_own = config.integer("intermediate_size"), len(windows) - n_shared
        yield "feed_forward_length", Typed("array[i32]", [n_ff * (1 + (il >= n_own)) for il in range(len(windows))])


GEMMA3N_LAYER: Names = {
    "altup.prediction_coefs": "altup_predict_coef", "altup.correction_coefs": "altup_correct_coef",
    "altup.correct_output_scale": "altup_correct_scale", "altup.modality_router": "altup_router",
    "altup.router_norm": "altup_router_norm", "laurel.linear_left": "laurel_l", "laurel.linear_right": "laurel_r",
    "laurel.post_laurel_norm": "laurel_post_norm",
}  # fmt: skip
GEMMA3N = {
    **GEMMA, "sliding_window": 512, "num_key_value_heads": 2, "final_logit_softcapping": 30.0, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768, "num_kv_shared_layers": 15, "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262144, "altup_num_inputs": 4, "altup_active_idx": 0, "altup_coef_clip": 120.0,
    "laurel_rank": 64, "activation_sparsity_pattern": None, "sliding_window_pattern": 5, "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}  # fmt: skip


def gemma3n_keys(config: Config, windows: list[bool]) -> Iterator[tuple[str, Typed]]:
    """Yield the widths of the ffn and the factors of its sparse activations, for each layer."""
    n = len(windows)
    widths, given = config.get("intermediate_size"), config.get("activation_sparsity_pattern")
    if not isinstance(widths, list) or len(widths) != n or any(type(width) is not int for width in widths):
        widths = [config.integer("intermediate_size")] * n
    shares = [0.95 * (n > 10 and il < 10) for il in range(n)] if given is None else given
    shares = shares if isinstance(shares, list) else [shares] * n
    if len(shares) != n or not all(isinstance(share, int | float) and 0 <= share < 1 for share in shares):
        raise config.wrong(("activation_sparsity_pattern",), f"{n} numbers from 0 to 1")
    yield "feed_forward_length", Typed("array[i32]", widths) if len({*widths}) > 1 else Typed("u32", widths[0])
    factors = [NormalDist().inv_cdf(share) if share else -math.inf for share in shares]
    yield "activation_sparsity_scale", Typed("array[f32]", factors)


_GEMMA3_ROW = CheckpointLayout(
    "gemma3", {"Gemma3ForCausalLM": "gemma3_text", "Gemma3ForConditionalGeneration": "gemma3"},
    layer={**shared.LLAMA, **GEMMA2_NORMS, **shared.QK_NORM}, norm_offset=1.0, keys=CAPS[1:], windows="period",
    defaults={**GEMMA2, **GEMMA3, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window_pattern": 6},
    expected={**GEMMA_FIXED, "attn_logit_softcapping": (None,)},  # transformers does not apply it
)  # fmt: skip
ROWS = (
    CheckpointLayout("gemma", {"GemmaForCausalLM": "gemma"}, norm_offset=1.0, defaults=GEMMA, expected=GEMMA_FIXED),
    CheckpointLayout(
        "gemma2", {"Gemma2ForCausalLM": "gemma2"}, layer={**shared.LLAMA, **GEMMA2_NORMS}, norm_offset=1.0, keys=CAPS,
        windows="period", defaults={**GEMMA2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        expected=GEMMA_FIXED,
    ),
    replace(
        _GEMMA3_ROW, arch="gemma-embedding", classes={"Gemma3TextModel": "gemma3_text"}, one_way=True,
        model={"embed_tokens": "token_embd", "norm": "output_norm"},
        defaults={**_GEMMA3_ROW.defaults, "use_bidirectional_attention": False},
        expected={**_GEMMA3_ROW.expected, "use_bidirectional_attention": (True,)},
    ),
    _GEMMA3_ROW,
    CheckpointLayout(
        "gemma4", {"Gemma4ForCausalLM": "gemma4_text", "Gemma4ForConditionalGeneration": "gemma4"},
        layer={
            **shared.LLAMA, **GEMMA2_NORMS, **shared.QK_NORM, **PER_LAYER, **GEMMA4_EXPERTS,
            "layer_scalar": "layer_output_scale",
        },
        model=PER_LAYER_MODEL,
        keys=(shared.N_EXPERT, *CAPS[1:], *SHARED_KV, ("expert_used_count", "u32", ("top_k_experts",))),
        more_keys=gemma4_keys, windows="period", defaults=GEMMA4,
        expected={**GEMMA_FIXED, "use_bidirectional_attention": ("vision",)},
    ),
    CheckpointLayout(
        "gemma3n", {"Gemma3nForCausalLM": "gemma3n_text", "Gemma3nForConditionalGeneration": "gemma3n"},
        layer={**shared.LLAMA, **GEMMA2_NORMS, **shared.QK_NORM, **PER_LAYER, **GEMMA3N_LAYER},
        model={
            **PER_LAYER_MODEL, "model.altup_projections.@": "altup_proj",
            "model.altup_unembed_projections.@": "altup_unembd_proj",
        },
        keys=(
            ("feed_forward_length", "u32", ("feed_forward_length",)),  # see gemma3n_keys
            *CAPS[1:], *SHARED_KV, ("altup.active_idx", "u32", ("altup_active_idx",)),
            ("altup.num_inputs", "u32", ("altup_num_inputs",)),
        ),
        more_keys=gemma3n_keys, windows="period", defaults=GEMMA3N,
        expected={**GEMMA_FIXED, "altup_correct_scale": (True,), "altup_active_idx": (0,)},
    ),
)  # fmt: skip
