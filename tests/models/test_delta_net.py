"""Qwen's hybrids: logits against transformers, and what a state must outlast: sessions, going back, other sequences."""

from pathlib import Path
from typing import Any

import pytest
import tiny

pytest.importorskip("torch")
pytest.importorskip("transformers")

# Three heads of v for each head of k, so that the two orders of heads differ.
HEADS = {
    "hidden_size": 72, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]}
SECTIONS = {"rope_parameters": {**ROPE, "mrope_interleaved": True}}
EXPERTS = {
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 56,
}  # fmt: skip
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen35": ("Qwen3_5ForCausalLM", {**HEADS, **SECTIONS}),
    "qwen35moe": ("Qwen3_5MoeForCausalLM", {**HEADS, **SECTIONS, **EXPERTS}),
    "qwen3next": ("Qwen3NextForCausalLM", {**HEADS, **EXPERTS, "norm_topk_prob": True}),
}


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    tiny.check(tmp_path, *TINY[name])
