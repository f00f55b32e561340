"""Mixtures of experts of this year: logits of tiny checkpoints are those of transformers."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny

_SIZES = {"hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
_MOE = {**_SIZES, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
_LEAD = {**_MOE, "n_routed_experts": 8, "first_k_dense_replace": 1}
_VISION = {
    "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 72,
    "deepstack_visual_indexes": [0],
}  # fmt: skip
_GROUPS = {"n_group": 4, "topk_group": 2}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "dots1": ("Dots1ForCausalLM", {**_LEAD, "n_shared_experts": 2, "routed_scaling_factor": 2.5}),
    "glm4moe": ("Glm4MoeForCausalLM", {**_LEAD, **_GROUPS, "use_qk_norm": True, "routed_scaling_factor": 1.5}),
    "glm4moe-air": ("Glm4MoeForCausalLM", {**_LEAD, "attention_bias": True, "norm_topk_prob": False}),
    "minimax-m2": (
        "MiniMaxM2ForCausalLM",
        {**_SIZES, "num_local_experts": 8, "num_experts_per_tok": 3, "rotary_dim": 8},
    ),
    "ernie4_5-moe": (
        "Ernie4_5_MoeForCausalLM",
        {**_MOE, "num_hidden_layers": 4, "moe_num_experts": 8, "moe_k": 3, "moe_layer_interval": 2,
         "moe_layer_start_index": 2},
    ),
    "hunyuan-moe": ("HunYuanMoEV1ForCausalLM", {**_SIZES, "num_experts": 4, "moe_topk": 2}),
    "qwen3vlmoe": (
        "Qwen3VLMoeForConditionalGeneration",
        {"text_config": {**_MOE, "num_experts": 8}, "vision_config": _VISION},
    ),
    "afmoe": (
        "AfmoeForCausalLM",
        {**_MOE, "num_hidden_layers": 4, "num_experts": 8, "num_dense_layers": 1, "mup_enabled": True,
         "route_scale": 1.7, "sliding_window": 8},
    ),
    "phimoe": (
        "PhimoeForCausalLM",
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "num_local_experts": 8,
         "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        {**_SIZES, "num_hidden_layers": 4, "intermediate_size_mlp": 104, "intermediate_size": 40,
         "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
         "attention_chunk_size": 16, "floor_scale": 16},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*tensors for images or sound are left out")
@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    tiny.check(tmp_path, *TINY[name])
