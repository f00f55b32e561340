"""Models with latent attention: logits of tiny random checkpoints are those of transformers."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny

_SIZES = {
    "hidden_size": 72, "intermediate_size": 104, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 20,
    "moe_intermediate_size": 40, "first_k_dense_replace": 1, "rms_norm_eps": 1e-6, "num_experts_per_tok": 2,
    "n_routed_experts": 6, "n_shared_experts": 1, "q_lora_rank": 40,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707,
    "mscale_all_dim": 0.707, "original_max_position_embeddings": 64,
}  # fmt: skip
_GROUPS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
_GREEDY = {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "norm_topk_prob": False}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "V2-Lite": (
        "DeepseekV2ForCausalLM",
        {
            **_SIZES, **_GREEDY, "q_lora_rank": None, "n_shared_experts": 2, "routed_scaling_factor": 1.5,
            "rope_parameters": _YARN,
        },
    ),
    "V2": (
        "DeepseekV2ForCausalLM",
        {
            **_SIZES, **_GROUPS, "topk_method": "group_limited_greedy", "norm_topk_prob": False,
            "routed_scaling_factor": 16.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "V3": (
        "DeepseekV3ForCausalLM",
        {
            **_SIZES, **_GROUPS, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "GLM 4.7 Flash": (
        "Glm4MoeLiteForCausalLM",
        {**_SIZES, "num_hidden_layers": 3, "v_head_dim": 32, "routed_scaling_factor": 1.8, "rms_norm_eps": 1e-3},
    ),
    "Mistral Small 4": (
        "Mistral4ForCausalLM",
        {
            **_SIZES, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    tiny.check(tmp_path, *TINY[name])
