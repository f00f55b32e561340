"""Checkpoints of Llama and of decoders with one feed-forward network in a layer."""

from dataclasses import replace

from gguf_run.runtime.convert.layout import (
    ATTENTION,
    DENSE,
    LLAMA,
    MIXTRAL_EXPERTS,
    MOE,
    NUMBERED,
    POST_NORMS,
    PRE_NORMS,
    QK_NORM,
    QWEN,
    SILU,
    VOCAB_SIZE,
    CheckpointLayout,
    network,
)

# Llama 1 to 3.x, and what copies its layer.
LLAMA_ROW = CheckpointLayout(
    "llama",
    {"LlamaForCausalLM": "llama", "LLaMAForCausalLM": "llama"},
    layer={**LLAMA, **MIXTRAL_EXPERTS, **MOE},
    permuted=True,
    rope_dim=True,
    keys=(VOCAB_SIZE,),
)
ROWS = (
    LLAMA_ROW,
    replace(LLAMA_ROW, classes={"MistralForCausalLM": "mistral"}, windows="all", defaults={"sliding_window": 4096}),
    replace(LLAMA_ROW, classes={"MixtralForCausalLM": "mixtral"}, windows="all", defaults={"rope_theta": 1e6}),
    CheckpointLayout("qwen2", {"Qwen2ForCausalLM": "qwen2"}, bias_key="", windows="last", switch=True, defaults=QWEN),
    CheckpointLayout(
        "qwen3",
        {"Qwen3ForCausalLM": "qwen3"},
        layer={**LLAMA, **QK_NORM},
        windows="last",
        switch=True,
        defaults={**QWEN, "head_dim": 128},
    ),
    CheckpointLayout(
        "phi3",
        {"Phi3ForCausalLM": "phi3"},
        layer={
            **PRE_NORMS,
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
        rope_dim=True,
        original_context=True,
        bias_key="",
        windows="all",
        # No window is written as 0: in old GGUF files a missing key means 2047.
        defaults={"sliding_window": 0, "original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0},
        expected={**SILU, "lm_head_bias": (False,)},
    ),
    CheckpointLayout(
        "smollm3",
        {"SmolLM3ForCausalLM": "smollm3"},
        permuted=True,
        rope_dim=True,
        keys=(VOCAB_SIZE,),
        windows="unrotated",
        switch=True,
        defaults={"rope_theta": 2e6, "tie_word_embeddings": True},
        expected={**SILU, "no_rope_layer_interval": (4,)},
    ),
    CheckpointLayout(
        "granite",
        {"GraniteForCausalLM": "granite"},
        permuted=True,
        rope_dim=True,
        keys=(
            VOCAB_SIZE,
            ("attention.scale", "f32", ("attention_multiplier",)),
            ("embedding_scale", "f32", ("embedding_multiplier",)),
            ("residual_scale", "f32", ("residual_multiplier",)),
            ("logit_scale", "f32", ("logits_scaling",)),
        ),
        defaults={"attention_multiplier": 1.0},
    ),
    CheckpointLayout(
        "olmo2",
        {"Olmo2ForCausalLM": "olmo2"},
        layer={**ATTENTION, **DENSE, **QK_NORM, **POST_NORMS},
        tied_copy=True,
    ),
    CheckpointLayout(
        "stablelm",
        {"StableLmForCausalLM": "stablelm", "StableLMEpochForCausalLM": "stablelm_epoch"},
        layer={**LLAMA, **{f"self_attn.{name}_layernorm.norms.@": f"attn_{name}_norm" for name in "qk"}},
        rope_dim=True,
        tied_copy=True,
        keys=(
            ("use_parallel_residual", "bool", ("use_parallel_residual",)),
            ("attention.layer_norm_epsilon", "f32", ("layer_norm_eps", "norm_eps")),  # the second: of the first files
        ),
        bias_key="use_qkv_bias",
        defaults={"partial_rotary_factor": 0.25},
    ),
    CheckpointLayout(
        "starcoder2",
        {"Starcoder2ForCausalLM": "starcoder2"},
        layer={**PRE_NORMS, **ATTENTION, "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
        keys=(("attention.layer_norm_epsilon", "f32", ("norm_epsilon", "layer_norm_eps", "layer_norm_epsilon")),),
        bias_key="use_bias",
        windows="all",
        defaults={"tie_word_embeddings": True},
        expected={"hidden_act": ("gelu_pytorch_tanh",), "norm_type": ("layer_norm",), "mlp_type": ("default",)},
    ),
    CheckpointLayout(
        "internlm2",
        {"InternLM2ForCausalLM": "internlm2"},
        model={"model.tok_embeddings": "token_embd", "model.norm": "output_norm", "output": "output"},
        layer={
            "attention_norm": "attn_norm",
            "attention.wqkv": ("attn_q", "attn_k", "attn_v"),
            "attention.wo": "attn_output",
            "ffn_norm": "ffn_norm",
            **network("feed_forward", words=NUMBERED),
        },
        permuted=True,
        tied_copy=True,
        bias_key="bias",
    ),
)
