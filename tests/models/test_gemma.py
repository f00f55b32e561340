"""Gemma 4 and Gemma 3n: logits of tiny checkpoints are those of transformers."""

import pytest
import tiny

pytest.importorskip("transformers")

S, F = "sliding_attention", "full_attention"
GEMMA4 = {
    "hidden_size": 72, "num_attention_heads": 4, "head_dim": 16, "global_head_dim": 32, "sliding_window": 8,
    "final_logit_softcapping": 30.0, "tie_word_embeddings": True,
    "rope_parameters": {
        F: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        S: {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip
# A second kind of head in layers without a window, whose values are made of keys.
OTHER_HEADS = {"num_global_key_value_heads": 1, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0}
EXPERTS = {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 40}
# name -> (transformers' model class, config beyond hf_tiny._COMMON)
TINY = {
    "gemma4-e": (
        "Gemma4ForCausalLM",
        {**GEMMA4, "num_hidden_layers": 6, "layer_types": [S, F] * 3, "num_key_value_heads": 1,
         "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 24,
         "vocab_size_per_layer_input": 300},
    ),
    "gemma4-31": (
        "Gemma4ForCausalLM",
        {**GEMMA4, **OTHER_HEADS, "num_hidden_layers": 3, "layer_types": [S, S, F], "num_key_value_heads": 4,
         "num_global_key_value_heads": 2},
    ),
    "gemma4-26": (
        "Gemma4ForCausalLM",
        {**GEMMA4, **OTHER_HEADS, **EXPERTS, "layer_types": [S, F], "num_key_value_heads": 2, "intermediate_size": 56},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_transformers(name, tmp_path):
    tiny.check(tmp_path, *TINY[name])
