"""Qwen's hybrids of Gated DeltaNet and gated attention, see mixers/delta_net.py."""

from dataclasses import replace

from gguf_run.models.architectures import QK, Architecture

_QWEN35 = Architecture(
    "qwen35", rope_style="neox", norms=("attn_norm", "post_attention_norm", *QK), ffn_norm="post_attention_norm",
    mixer="delta_net", shapes={"attn_q": ("n_embd", "n_embd_q+n_embd_q")},
)  # fmt: skip
ENTRIES = (
    _QWEN35, replace(_QWEN35, name="qwen35moe", moe="yes", shared_gate=True),
    replace(_QWEN35, name="qwen3next", moe="yes", shared_gate=True),
)  # fmt: skip
