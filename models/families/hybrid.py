"""Decoders whose layers have a mixer in place of attention, or beside it: see models/mixers."""

from dataclasses import replace

from gguf_run.models.architectures import PRE, QK, Architecture

# Qwen's Gated DeltaNet and gated attention.
_QWEN35 = Architecture(
    "qwen35", rope_style="neox", norms=("attn_norm", "post_attention_norm", *QK), ffn_norm="post_attention_norm",
    mixer="delta_net", shapes={"attn_q": ("n_embd", "n_embd_q+n_embd_q")},
)  # fmt: skip
_LFM2 = Architecture("lfm2", rope_style="neox", norms=(*PRE, *QK), output_norm="token_embd_norm", mixer="short_conv")
# Each layer is one of three: attention, Mamba 2, or a feed-forward network. No layer rotates.
_NEMOTRON = Architecture(
    "nemotron_h", activation="relu2", gated=False, gate_up=("ffn_up",), norms=("attn_norm",), ffn_norm="attn_norm",
    no_rope_period=1, mixer="mamba",
)  # fmt: skip
# DeepSeek V2 to R1, Kimi K2, GLM 4.7 Flash. The first files of V3 and GLM 4.7 have no key of the gating.
_LATENT = Architecture(
    "deepseek2", qkv=(), mixer="latent", moe="maybe", gating="", router_bias="maybe", expert_norm=False,
)  # fmt: skip
ENTRIES = (
    _QWEN35,
    replace(_QWEN35, name="qwen35moe", moe="yes", shared_gate=True),
    replace(_QWEN35, name="qwen3next", moe="yes", shared_gate=True),
    _LFM2,
    replace(_LFM2, name="lfm2moe", moe="yes", gating="sigmoid", router_bias="maybe"),
    Architecture("granitehybrid", rope_key="rope.scaling.finetuned", moe="maybe", mixer="mamba"),
    _NEMOTRON,
    replace(_NEMOTRON, name="nemotron_h_moe", moe="yes", gating="sigmoid", router_bias="yes", expert_norm=False),
    Architecture("falcon-h1", rope_style="neox", mixer="mamba"),
    _LATENT,
    replace(_LATENT, name="mistral4", gating="softmax"),  # Mistral Small 4
)
