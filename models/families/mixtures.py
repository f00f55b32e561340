"""Decoders whose layers have experts."""

from collections.abc import Mapping
from typing import Any

from gguf_run.models.architectures import POST, PRE, QK, WHOLE_ROW, Architecture

# Experts are chosen by the sigmoid of their logits and a bias.
_SIGMOID: Mapping[str, Any] = {"moe": "yes", "gating": "sigmoid", "router_bias": "yes", "expert_norm": False}
ENTRIES = (
    Architecture("granitemoe", moe="yes"),
    Architecture("qwen2moe", rope_style="neox", moe="yes", expert_norm=False, shared_gate=True),
    Architecture("qwen3moe", rope_style="neox", norms=(*PRE, *QK), moe="yes"),
    Architecture("deepseek", moe="yes", expert_norm=False),
    Architecture("olmoe", rope_style="neox", norms=(*PRE, *QK), moe="yes", expert_norm=False, shapes=WHOLE_ROW),
    Architecture(
        "gpt-oss", rope_style="neox", norms=("attn_norm", "post_attention_norm"), ffn_norm="post_attention_norm",
        sinks=True, swa_period=2, yarn_truncate=False, moe="yes", expert_activation="swiglu_oai",
    ),
    Architecture("qwen3vlmoe", rope_style="neox", norms=(*PRE, *QK), moe="yes"),
    Architecture("hunyuan-moe", rope_style="neox", norms=(*PRE, *QK), qk_norm_after_rope=True, moe="yes"),
    Architecture("ernie4_5-moe", moe="yes", router_bias="maybe"),
    Architecture("dots1", rope_style="neox", norms=(*PRE, *QK), **_SIGMOID),
    Architecture("bailingmoe2", rope_style="neox", norms=(*PRE, *QK), qkv=("attn_qkv",), **_SIGMOID),
    Architecture(
        "glm4moe", rope_style="neox", norms=("attn_norm", "post_attention_norm", *QK), ffn_norm="post_attention_norm",
        optional_norms=QK,  # 4.5 Air has none
        **_SIGMOID,
    ),
    Architecture(
        "minimax-m2", rope_style="neox", norms=(*PRE, *QK), shapes=WHOLE_ROW, **{**_SIGMOID, "expert_norm": True},
    ),
    Architecture(
        "afmoe", rope_style="neox", norms=(*PRE, *QK, *POST), scaled_embd=True, window_rope=True, swa_period=4,
        step="afmoe_step", more={"blk.N.attn_gate.weight": ("n_embd", "n_embd_q")}, **_SIGMOID,
    ),
    Architecture(
        "phimoe", rope_style="neox", layer_norm=True, swa_period=1,  # files have a window that no layer has
        moe="yes", gating="sparsemixer", expert_norm=False,
    ),
    Architecture(
        "llama4", qk_norm_after_rope=True, no_qk_norm_n_expert=128, no_rope_period=4, temperature=(0.1, 8192, 1),
        swa_period=4, chunk=8192, moe="yes", gating="sigmoid", weighs_input=True, expert_norm=False,
    ),
)  # fmt: skip
