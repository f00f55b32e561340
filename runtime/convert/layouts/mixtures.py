"""Checkpoints of decoders with experts."""

from gguf_run.models.experts import EXPERTS
from gguf_run.runtime.convert import shared
from gguf_run.runtime.convert.layout import CheckpointLayout
from gguf_run.runtime.convert.shared import Names, network
from gguf_run.runtime.convert.stored.checkpoint import Config

EVERY_LAYER_HAS_EXPERTS = {"decoder_sparse_step": (1,), "mlp_only_layers": ([],)}
GPT_OSS_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip

SHARED_COUNT = {"num_shared_experts": "n_shared_experts"}
SHARED = network("mlp.shared_experts", "_shexp")
SHARED_BY_GATE: Names = {"mlp.shared_expert_gate": "ffn_gate_inp_shexp", **network("mlp.shared_expert", "_shexp")}
CHOICE: Names = {"mlp.gate.e_score_correction": "exp_probs_b"}
LEAD_DEFAULTS = {**shared.NORM, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1}
SIGMOID = {"scoring_func": ("sigmoid",), "score_func": ("sigmoid",), "topk_method": ("noaux_tc",)}


def _same(config: Config, name: str) -> int:
    """Return the number that all layers have in a list."""
    value = config.get(name)
    if isinstance(value, list) and value and value.count(value[0]) == len(value):
        value = value[0]
    return config.plus(**{name: value}).integer(name)


def _minimax(layout: CheckpointLayout, config: Config) -> tuple[CheckpointLayout, Config]:
    if (n_rot := config.get("rotary_dim")) is not None:
        config = config.plus(rotary_dim=None, partial_rotary_factor=n_rot / config.integer("head_dim"))
    return layout, config


def _ernie(layout: CheckpointLayout, config: Config) -> tuple[CheckpointLayout, Config]:
    last, n_shared = config.integer("num_hidden_layers") - 1, config.get("n_shared_experts") or 0
    if config.get("moe_layer_end_index") not in (None, -1, last):
        raise config.unsupported("moe_layer_end_index", f"{last}, the last layer")
    n_ff = n_shared * config.integer("moe_intermediate_size")
    return layout, config.plus(n_shared_experts=n_shared, _n_ff_shexp=n_ff, moe_layer_end_index=None)


def _hunyuan(layout: CheckpointLayout, config: Config) -> tuple[CheckpointLayout, Config]:
    n_ff, names = config.integer("intermediate_size"), ("num_experts_per_tok", "n_shared_experts")
    more = {name: _same(config, name) for name in names if config.get(name) is not None}
    shared = n_ff * more.get("n_shared_experts", 1)
    return layout, config.plus(moe_intermediate_size=n_ff, shared_expert_intermediate_size=shared, **more)


def _phimoe(layout: CheckpointLayout, config: Config) -> tuple[CheckpointLayout, Config]:
    """The factors of queries and keys of long and of short texts are one number in a GGUF file."""
    names = [name for name in ("rope_parameters", "rope_scaling") if isinstance(config.get(name), dict)]
    rope = {key: value for name in names for key, value in config.get(name).items()}
    short, long = (rope.pop(f"{kind}_mscale", None) for kind in ("short", "long"))
    if short != long:
        raise config.plus(long_mscale=long).wrong(("long_mscale",), f"short_mscale, which is {short}")
    if short is not None:
        rope["attention_factor"] = short
    return layout, config.plus(**dict.fromkeys(names, rope))


def _llama4(layout: CheckpointLayout, config: Config) -> tuple[CheckpointLayout, Config]:
    n_layer, step = config.integer("num_hidden_layers"), config.integer("interleave_moe_layer_step")
    fixed = {
        "moe_layers": [*range(step - 1, n_layer, step)],
        "layer_types": ["chunked_attention" if (il + 1) % 4 else "full_attention" for il in range(n_layer)],
        "use_qk_norm": config.integer("num_local_experts") != layout.decoder.no_qk_norm_n_expert,
    }
    for name, only in fixed.items():
        if config.get(name) not in (None, only):
            raise config.unsupported(name, str(only))
    scale = {"attn_scale": 0.0} if config.get("attn_temperature_tuning") is False else {}
    return layout, config.plus(**dict.fromkeys(fixed), **scale)


ROWS = (
    CheckpointLayout(
        "qwen2moe", {"Qwen2MoeForCausalLM": "qwen2_moe"}, layer={**shared.LLAMA_MOE, **SHARED_BY_GATE}, tied_copy=True,
        keys=(shared.N_EXPERT,), bias_key="qkv_bias", windows="first", switch=True,
        defaults={**shared.QWEN, **shared.NORM}, expected=EVERY_LAYER_HAS_EXPERTS,
    ),
    CheckpointLayout(
        "qwen3moe", {"Qwen3MoeForCausalLM": "qwen3_moe"}, layer={**shared.LLAMA_MOE, **shared.QK_NORM},
        keys=(shared.N_EXPERT,), windows="all", switch=True, defaults={"sliding_window": 4096, **shared.NORM},
        expected=EVERY_LAYER_HAS_EXPERTS,
    ),
    CheckpointLayout(
        "olmoe", {"OlmoeForCausalLM": "olmoe"}, layer={**shared.LLAMA_MOE, **shared.QK_NORM},
        defaults={**shared.NORM, "rms_norm_eps": 1e-5}, expected={"clip_qkv": (None,)},
    ),
    CheckpointLayout(
        "deepseek", {"DeepseekForCausalLM": "deepseek"}, layer={**shared.LLAMA, **shared.MOE, **SHARED}, permuted=True,
        rope_dim=True, rope_type="none", keys=(shared.VOCAB_SIZE, *shared.LEAD),
        defaults={"first_k_dense_replace": 0, "routed_scaling_factor": 1.0, **shared.NORM},
        expected={"scoring_func": ("softmax",), "moe_layer_freq": (1,)},
    ),
    CheckpointLayout(
        "gpt-oss", {"GptOssForCausalLM": "gpt_oss"},
        layer={
            **shared.ATTENTION, "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
            "self_attn.sinks": "attn_sinks", "mlp.router": "ffn_gate_inp", **shared.FUSED_EXPERTS,
        },
        bare=("attn_sinks", *EXPERTS), interleaved=True, tied_copy=True,
        keys=(("expert_feed_forward_length", "u32", ("intermediate_size",)),), windows="period",
        defaults={"rope_theta": 150000.0, "rope_parameters": GPT_OSS_ROPE, "sliding_window": 128, "head_dim": 64},
        expected={"swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
    ),
    CheckpointLayout(
        "qwen3vlmoe", {"Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe"}, one_way=True,
        layer={**shared.LLAMA_MOE, **shared.QK_NORM}, bare=EXPERTS, keys=(shared.N_EXPERT,),
        defaults={"head_dim": 128, "rope_theta": 5e6}, expected=EVERY_LAYER_HAS_EXPERTS,
    ),
    CheckpointLayout(
        "dots1", {"Dots1ForCausalLM": "dots1"}, one_way=True,
        layer={**shared.LLAMA, **shared.MOE, **shared.QK_NORM, **SHARED, **CHOICE}, tied_copy=True,
        keys=(*shared.LEAD, *shared.GROUPS), windows="last",
        defaults={**LEAD_DEFAULTS, "sliding_window": 4096, "max_window_layers": 62}, expected=SIGMOID,
    ),
    CheckpointLayout(
        "glm4moe", {"Glm4MoeForCausalLM": "glm4_moe"}, one_way=True,
        layer={
            **shared.LLAMA, **shared.MOE, **shared.QK_NORM, **SHARED, **CHOICE,
            "post_attention_layernorm": "post_attention_norm",
        },
        rope_dim=True, keys=(*shared.LEAD, *shared.GROUPS),
        defaults={**LEAD_DEFAULTS, "norm_topk_prob": True, "partial_rotary_factor": 0.5}, expected=SIGMOID,
    ),
    CheckpointLayout(
        "bailingmoe2", {"BailingMoeV2ForCausalLM": "bailing_moe"},
        layer={
            **shared.PRE_NORMS, **shared.DENSE, **shared.MOE, **SHARED, "attention.query_key_value": "attn_qkv",
            "attention.dense": "attn_output", "attention.query_layernorm": "attn_q_norm",
            "attention.key_layernorm": "attn_k_norm", "mlp.gate.expert": "exp_probs_b",
        },
        model={**shared.MODEL, "model.word_embeddings": "token_embd"}, tied_copy=True, rope_dim=True,
        keys=(
            shared.VOCAB_SIZE, *shared.LEAD, *shared.GROUPS,
            ("expert_shared_feed_forward_length", "u32", ("moe_intermediate_size",)),
        ),
        bias_key="", defaults={**LEAD_DEFAULTS, "partial_rotary_factor": 0.5},
        expected={**SIGMOID, "use_bias": (False,), "use_qkv_bias": (False,), "use_rmsnorm": (True,)},
        aliases=SHARED_COUNT,
    ),
    CheckpointLayout(
        "minimax-m2", {"MiniMaxM2ForCausalLM": "minimax_m2"},
        layer={
            **shared.PRE_NORMS, **shared.ATTENTION, **shared.QK_NORM, **shared.MIXTRAL_EXPERTS,
            "block_sparse_moe.e_score_correction": "exp_probs_b",
        },
        tied_copy=True, rope_dim=True, keys=(("expert_feed_forward_length", "u32", ("intermediate_size",)),),
        defaults={"rope_theta": 5e6, "partial_rotary_factor": 1.0},
        expected={**SIGMOID, "qk_norm_type": ("per_layer",), "use_routing_bias": (True,)}, read=_minimax,
    ),
    CheckpointLayout(
        "ernie4_5-moe", {"Ernie4_5_MoeForCausalLM": "ernie4_5_moe", "Ernie4_5_MoE_ForCausalLM": "ernie4_5_moe"},
        layer={**shared.LLAMA, **shared.MOE, **SHARED, "mlp.moe_statics.e_score_correction": "exp_probs_b"},
        keys=(
            shared.VOCAB_SIZE, shared.N_EXPERT, ("interleave_moe_layer_step", "u32", ("moe_layer_interval",)),
            ("leading_dense_block_count", "u32", ("moe_layer_start_index",)),
            ("expert_shared_feed_forward_length", "u32", ("_n_ff_shexp",)),
        ),
        bias_key="use_bias",
        defaults={"rope_theta": 5e5, "tie_word_embeddings": True, "moe_layer_interval": 1, "use_bias": False},
        expected={"moe_norm_min": (1e-12,)},
        aliases={
            "moe_num_experts": "num_experts", "moe_k": "num_experts_per_tok",
            "moe_num_shared_experts": "n_shared_experts",
        },
        read=_ernie,
    ),
    CheckpointLayout(
        "hunyuan-moe", {"HunYuanMoEV1ForCausalLM": "hunyuan_v1_moe"},
        layer={
            **shared.LLAMA_MOE, **network("mlp.shared_mlp", "_shexp"), "mlp.gate.wg": "ffn_gate_inp",
            "self_attn.query_layernorm": "attn_q_norm", "self_attn.key_layernorm": "attn_k_norm",
        },
        aliases={"moe_topk": "num_experts_per_tok", "num_shared_expert": "n_shared_experts"}, keys=(shared.N_EXPERT,),
        ntk_alpha=True, expected={"use_cla": (False,)}, read=_hunyuan,
    ),
    CheckpointLayout(
        "afmoe", {"AfmoeForCausalLM": "afmoe"},
        layer={
            **shared.ATTENTION, **shared.QK_NORM, **shared.DENSE, **shared.MOE, **SHARED,
            "self_attn.gate_proj": "attn_gate", "input_layernorm": "attn_norm",
            "post_attention_layernorm": "post_attention_norm", "pre_mlp_layernorm": "ffn_norm",
            "post_mlp_layernorm": "post_ffw_norm", "mlp.router.gate": "ffn_gate_inp", "mlp.expert": "exp_probs_b",
        },
        keys=(
            shared.VOCAB_SIZE, shared.N_EXPERT, ("leading_dense_block_count", "u32", ("num_dense_layers",)),
            ("expert_weights_scale", "f32", ("route_scale",)), ("expert_weights_norm", "bool", ("route_norm",)),
        ),
        windows="period",
        defaults={"sliding_window": 1024, "global_attn_every_n_layers": 4, "route_norm": True, "num_dense_layers": 1},
        expected={**SIGMOID, "mup_enabled": (True,), "n_group": (1,), "topk_group": (1,)}, aliases=SHARED_COUNT,
    ),
    CheckpointLayout(
        "phimoe", {"PhimoeForCausalLM": "phimoe", "PhiMoEForCausalLM": "phimoe"},
        layer={**shared.PRE_NORMS, **shared.ATTENTION, **shared.MIXTRAL_EXPERTS}, tied_copy=True, rope_dim=True,
        original_context=True, defaults={"rope_theta": 1e6, "sliding_window": None, "lm_head_bias": False},
        expected={"router_jitter_noise": (0.01,), "num_experts_per_tok": (2,)}, read=_phimoe,
    ),
    CheckpointLayout(
        "llama4", {"Llama4ForCausalLM": "llama4_text", "Llama4ForConditionalGeneration": "llama4"},
        layer={
            **shared.PRE_NORMS, **shared.ATTENTION, **network("feed_forward"),
            **network("feed_forward.shared_expert", "_shexp"), "feed_forward.router": "ffn_gate_inp",
            "feed_forward.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
            "feed_forward.experts.down_proj": "ffn_down_exps",
        },
        bare=EXPERTS, tied_copy=True, rope_dim=True,
        keys=(
            shared.VOCAB_SIZE, ("interleave_moe_layer_step", "u32", ("interleave_moe_layer_step",)),
            ("attention.sliding_window", "u32", ("attention_chunk_size",)),
            ("attention.temperature_scale", "f32", ("attn_scale",)),
            ("attention.temperature_length", "u32", ("floor_scale",)),
        ),
        defaults={
            "rope_theta": 5e5, "interleave_moe_layer_step": 1, "attention_chunk_size": 8192, "attn_scale": 0.1,
            "floor_scale": 8192, "num_local_experts": 16, "num_experts_per_tok": 1, "head_dim": 128,
            "intermediate_size": 16384, "attn_temperature_tuning": True, "no_rope_layer_interval": 4,
        },
        expected={"no_rope_layer_interval": (4,), "attn_temperature_tuning": (True, False, 4)},
        aliases={"intermediate_size": "moe_intermediate_size", "intermediate_size_mlp": "intermediate_size"},
        read=_llama4,
    ),
)  # fmt: skip
