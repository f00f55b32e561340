"""Decoders whose layers have one feed-forward network. Mistral 3 may have experts too."""

from gguf_run.models.architectures import POST, PRE, QK, WHOLE_ROW, Architecture

ENTRIES = (
    Architecture("mistral3", moe="maybe"),
    Architecture("smollm3", no_rope_period=4),
    Architecture("internlm2"),
    Architecture("granite"),
    Architecture("ernie4_5"),
    Architecture("qwen2", rope_style="neox"),
    Architecture("qwen3", rope_style="neox", norms=(*PRE, *QK)),
    Architecture("qwen3vl", rope_style="neox", norms=(*PRE, *QK)),
    Architecture("hunyuan-dense", rope_style="neox", norms=(*PRE, *QK), qk_norm_after_rope=True),
    Architecture(
        "seed_oss", rope_style="neox", norms=("attn_norm", "post_attention_norm"), ffn_norm="post_attention_norm",
    ),
    Architecture("arcee", activation="relu2", gated=False, gate_up=("ffn_up",)),
    Architecture("apertus", rope_style="neox", norms=(*PRE, *QK), activation="xielu", gated=False, gate_up=("ffn_up",)),
    Architecture("nemotron", rope_style="neox", activation="relu2", gated=False, gate_up=("ffn_up",), layer_norm=True),
    Architecture(
        "phi3", rope_style="neox", qkv=("attn_qkv",), gate_up=("ffn_up",), shapes={"ffn_up": ("n_embd", "n_ff+n_ff")},
    ),
    Architecture(
        "glm4", neox_by_sections=True, norms=(*PRE, *POST), gate_up=("ffn_up",),
        shapes={"ffn_up": ("n_embd", "n_ff+n_ff")},
    ),
    Architecture("starcoder2", rope_style="neox", activation="gelu", gated=False, gate_up=("ffn_up",), layer_norm=True),
    Architecture(
        "stablelm", rope_style="neox", norms=(*PRE, *QK), layer_norm=True,
        optional_norms=("ffn_norm", *QK),  # 12B has q's and k's, and no ffn_norm
        shapes={"attn_q_norm": ("head_dim", "n_head"), "attn_k_norm": ("head_dim", "n_head_kv")},
    ),
    Architecture(
        "olmo2",  # and OLMo 3, which has windows
        rope_style="neox", norms=(*QK, *POST), swa_period=4, swa_rope_scaled=False, shapes=WHOLE_ROW,
    ),
    Architecture("exaone4", rope_style="neox", norms=(*QK, *POST), window_rope=True, swa_period=4),
    Architecture(
        "cohere2", norms=PRE, optional_norms=("ffn_norm",), layer_norm=True, window_rope=True, logits_multiplied=True,
        swa_period=4,
    ),
)  # fmt: skip
