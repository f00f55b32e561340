"""Checkpoints of decoders with experts."""

from gguf_run.models.architectures import EXPERTS
from gguf_run.runtime.convert.layout import (
    ATTENTION,
    EXPERT_FF,
    FUSED_EXPERTS,
    LLAMA,
    LLAMA_MOE,
    MOE,
    N_EXPERT,
    NORM,
    QK_NORM,
    QWEN,
    SILU,
    VOCAB_SIZE,
    CheckpointLayout,
    Key,
    network,
)

SHARED_FF: Key = ("expert_shared_feed_forward_length", "u32", ("shared_expert_intermediate_size",))
EVERY_LAYER_HAS_EXPERTS = {"decoder_sparse_step": (1,), "mlp_only_layers": ([],)}
GPT_OSS_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip

ROWS = (
    CheckpointLayout(
        "qwen2moe",
        {"Qwen2MoeForCausalLM": "qwen2_moe"},
        layer={**LLAMA_MOE, "mlp.shared_expert_gate": "ffn_gate_inp_shexp", **network("mlp.shared_expert", "_shexp")},
        tied_copy=True,
        keys=(N_EXPERT, EXPERT_FF, SHARED_FF),
        bias_key="qkv_bias",
        windows="first",
        switch=True,
        defaults={**QWEN, **NORM},
        expected={**SILU, **EVERY_LAYER_HAS_EXPERTS},
    ),
    CheckpointLayout(
        "qwen3moe",
        {"Qwen3MoeForCausalLM": "qwen3_moe"},
        layer={**LLAMA_MOE, **QK_NORM},
        keys=(N_EXPERT, EXPERT_FF),
        windows="all",
        switch=True,
        defaults={"sliding_window": 4096, **NORM},
        expected={**SILU, **EVERY_LAYER_HAS_EXPERTS},
    ),
    CheckpointLayout(
        "olmoe",
        {"OlmoeForCausalLM": "olmoe"},
        layer={**LLAMA_MOE, **QK_NORM},
        defaults={**NORM, "rms_norm_eps": 1e-5},
        expected={**SILU, "clip_qkv": (None,)},
    ),
    CheckpointLayout(
        "deepseek",
        {"DeepseekForCausalLM": "deepseek"},
        layer={**LLAMA, **MOE, **network("mlp.shared_experts", "_shexp")},
        permuted=True,
        rope_dim=True,
        rope_type="none",
        keys=(
            ("leading_dense_block_count", "u32", ("first_k_dense_replace",)),
            VOCAB_SIZE,
            ("expert_count", "u32", ("n_routed_experts",)),
            EXPERT_FF,
            ("expert_shared_count", "u32", ("n_shared_experts",)),
            ("expert_weights_scale", "f32", ("routed_scaling_factor",)),
        ),
        defaults={"first_k_dense_replace": 0, "routed_scaling_factor": 1.0, **NORM},
        expected={**SILU, "scoring_func": ("softmax",), "moe_layer_freq": (1,)},
    ),
    CheckpointLayout(
        "gpt-oss",
        {"GptOssForCausalLM": "gpt_oss"},
        layer={
            **ATTENTION,
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "post_attention_norm",
            "self_attn.sinks": "attn_sinks",
            "mlp.router": "ffn_gate_inp",
            **FUSED_EXPERTS,
        },
        bare=("attn_sinks", *EXPERTS),
        interleaved=True,
        tied_copy=True,
        keys=(("expert_feed_forward_length", "u32", ("intermediate_size",)),),
        windows="period",
        defaults={"rope_theta": 150000.0, "rope_parameters": GPT_OSS_ROPE, "sliding_window": 128, "head_dim": 64},
        expected={**SILU, "swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
    ),
)
