"""Checkpoints of the Gemma models."""

from gguf_run.runtime.convert.layout import LLAMA, POST_NORMS, PRE_NORMS, QK_NORM, CheckpointLayout, Key, Names

GEMMA2_NORMS: Names = {**PRE_NORMS, **POST_NORMS, "pre_feedforward_layernorm": "ffn_norm"}
CAPS: tuple[Key, ...] = (
    ("attn_logit_softcapping", "f32", ("attn_logit_softcapping",)),
    ("final_logit_softcapping", "f32", ("final_logit_softcapping",)),
)
# The first files say "gelu" by mistake: they mean the other one. Gemma 2 and 3 have both keys.
GEMMA_FIXED = {"hidden_activation": ("gelu_pytorch_tanh",), "hidden_act": ("gelu_pytorch_tanh", "gelu")}
GEMMA = {"head_dim": 256, "tie_word_embeddings": True}
GEMMA2 = {**GEMMA, "sliding_window": 4096, "query_pre_attn_scalar": 256}
# The first files of Gemma 3 leave out values that are the defaults of the class.
GEMMA3 = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072}

ROWS = (
    CheckpointLayout(
        "gemma",
        {"GemmaForCausalLM": "gemma"},
        norm_offset=1.0,
        defaults=GEMMA,
        expected=GEMMA_FIXED,
    ),
    CheckpointLayout(
        "gemma2",
        {"Gemma2ForCausalLM": "gemma2"},
        layer={**LLAMA, **GEMMA2_NORMS},
        norm_offset=1.0,
        keys=CAPS,
        windows="period",
        defaults={**GEMMA2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        expected=GEMMA_FIXED,
    ),
    CheckpointLayout(
        "gemma3",
        {"Gemma3ForCausalLM": "gemma3_text", "Gemma3ForConditionalGeneration": "gemma3"},
        layer={**LLAMA, **GEMMA2_NORMS, **QK_NORM},
        norm_offset=1.0,
        keys=CAPS[1:],
        windows="period",
        defaults={**GEMMA2, **GEMMA3, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window_pattern": 6},
        expected={**GEMMA_FIXED, "attn_logit_softcapping": (None,)},  # transformers does not apply it
    ),
)
