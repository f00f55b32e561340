"""Decoders whose layers have one feed-forward network. Mistral 3 may have experts too."""

from gguf_run.models.architectures import POST, PRE, QK, WHOLE_ROW, Architecture

ENTRIES = (
    Architecture("mistral3", moe="maybe"),
    Architecture("smollm3", no_rope_period=4),
    Architecture("internlm2"),
    Architecture("granite"),
    Architecture("qwen2", rope_style="neox"),
    Architecture("qwen3", rope_style="neox", norms=(*PRE, *QK)),
    Architecture(
        "phi3",
        rope_style="neox",
        qkv=("attn_qkv",),
        gate_up=("ffn_up",),
        shapes={"ffn_up": ("n_embd", "n_ff+n_ff")},
    ),
    Architecture("starcoder2", rope_style="neox", activation="gelu", gated=False, gate_up=("ffn_up",), layer_norm=True),
    Architecture(
        "stablelm",
        rope_style="neox",
        norms=(*PRE, *QK),
        optional_norms=("ffn_norm", *QK),  # 12B has q's and k's, and no ffn_norm
        layer_norm=True,
        shapes={"attn_q_norm": ("head_dim", "n_head"), "attn_k_norm": ("head_dim", "n_head_kv")},
    ),
    Architecture(
        "olmo2",  # and OLMo 3, which has windows
        rope_style="neox",
        norms=(*QK, *POST),
        swa_period=4,
        swa_rope_scaled=False,
        shapes=WHOLE_ROW,
    ),
)
