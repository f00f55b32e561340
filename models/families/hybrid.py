"""Decoders whose layers have a short convolution or Mamba 2 in place of attention, or beside it (models/mixers)."""

from dataclasses import replace

from gguf_run.models.architectures import PRE, QK, Architecture

_LFM2 = Architecture("lfm2", rope_style="neox", norms=(*PRE, *QK), output_norm="token_embd_norm", mixer="short_conv")
# Each layer is one of three: attention, Mamba 2, or a feed-forward network. No layer rotates.
_NEMOTRON = Architecture(
    "nemotron_h", activation="relu2", gated=False, gate_up=("ffn_up",), norms=("attn_norm",), ffn_norm="attn_norm",
    no_rope_period=1, mixer="mamba",
)  # fmt: skip
ENTRIES = (
    _LFM2,
    replace(_LFM2, name="lfm2moe", moe="yes", gating="sigmoid", router_bias="maybe"),
    Architecture("granitehybrid", rope_key="rope.scaling.finetuned", moe="maybe", mixer="mamba"),
    _NEMOTRON,
    replace(_NEMOTRON, name="nemotron_h_moe", moe="yes", gating="sigmoid", router_bias="yes", expert_norm=False),
    Architecture("falcon-h1", rope_style="neox", mixer="mamba"),
)  # fmt: skip
