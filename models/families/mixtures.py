"""Decoders whose layers have experts."""

from gguf_run.models.architectures import PRE, QK, WHOLE_ROW, Architecture

ENTRIES = (
    Architecture("granitemoe", moe="yes"),
    Architecture("qwen2moe", rope_style="neox", moe="yes", expert_norm=False, shared_gate=True),
    Architecture("qwen3moe", rope_style="neox", norms=(*PRE, *QK), moe="yes"),
    Architecture("deepseek", moe="yes", expert_norm=False),
    Architecture("olmoe", rope_style="neox", norms=(*PRE, *QK), moe="yes", expert_norm=False, shapes=WHOLE_ROW),
    Architecture(
        "gpt-oss",
        rope_style="neox",
        norms=("attn_norm", "post_attention_norm"),
        ffn_norm="post_attention_norm",
        sinks=True,
        swa_period=2,
        yarn_truncate=False,
        moe="yes",
        expert_activation="swiglu_oai",
    ),
)
