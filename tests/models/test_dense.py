"""Decoders with one feed-forward network in a layer: logits of tiny random checkpoints are those of transformers."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny

pytest.importorskip("torch")
pytest.importorskip("transformers")

_FREE = {"hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
_TIED = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}
_WINDOWS = {"num_hidden_layers": 4, "sliding_window": 8, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
_LLAMA31 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 72}
_SECTIONS = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]}

# name -> (transformers' model class, config beyond hf_tiny's)
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral3": ("Ministral3ForCausalLM", {**_FREE, "rope_parameters": _YARN}),
    "seed_oss": ("SeedOssForCausalLM", {**_FREE, "attention_bias": True}),
    "ernie4_5": ("Ernie4_5ForCausalLM", {**_FREE, "tie_word_embeddings": True}),
    "glm4": ("Glm4ForCausalLM", {**_FREE, "attention_bias": True}),
    "qwen3vl": (
        "Qwen3VLForConditionalGeneration",
        {"text_config": {**_FREE, "rope_parameters": _SECTIONS},
         "vision_config": {**_VISION, "deepstack_visual_indexes": [0]}},
    ),
    "hunyuan-dense": (
        "HunYuanDenseV1ForCausalLM",
        {**_FREE, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}},
    ),
    "arcee": ("ArceeForCausalLM", {**_TIED}),
    "nemotron": ("NemotronForCausalLM", {**_FREE}),
    "apertus": ("ApertusForCausalLM", {**_TIED, "rope_parameters": _LLAMA31}),
    "exaone4": ("Exaone4ForCausalLM", {**_FREE, **_WINDOWS}),
    "exaone4-full": ("Exaone4ForCausalLM", {**_FREE, "sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "cohere2": ("Cohere2ForCausalLM", {**_TIED, **_WINDOWS, "logit_scale": 0.25, "tie_word_embeddings": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    has_images = "vision_config" in TINY[name][1]
    with pytest.warns(UserWarning, match="tensors for images are left out") if has_images else nullcontext():
        tiny.check(tmp_path, *TINY[name])
