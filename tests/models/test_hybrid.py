"""Layers with a short convolution or Mamba 2 in place of attention, or beside it: random checkpoints."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny

_SIZES = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}
_LFM2 = {**_SIZES, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "norm_eps": 1e-3}
_MAMBA = {"mamba_n_heads": 12, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2}
# The residual stream is small and eps is large: a norm with the eps of another place shows.
_GRANITE = {
    **_SIZES, **_MAMBA, "num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "shared_intermediate_size": 56, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.4,
    "attention_multiplier": 0.2, "rms_norm_eps": 1e-3,
}  # fmt: skip
_NEMOTRON = {
    **_SIZES, "head_dim": 32, "mamba_num_heads": 8, "mamba_head_dim": 20, "ssm_state_size": 16, "n_groups": 2,
    "time_step_min": 1e-9, "layer_norm_epsilon": 1e-3,
}  # fmt: skip
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("Lfm2ForCausalLM", _LFM2),
    "granitehybrid": ("GraniteMoeHybridForCausalLM", {**_GRANITE, "num_local_experts": 0}),
    "nemotron_h": (
        "NemotronHForCausalLM",
        {**_NEMOTRON, "layers_block_type": ["linear_attention", "full_attention", "mlp", "linear_attention"]},
    ),
    "falcon-h1": (
        "FalconH1ForCausalLM",
        {**_SIZES, **_MAMBA, "head_dim": 16, "mamba_d_ssm": 192, "ssm_multipliers": [1.1, 0.9, 0.8, 1.2, 0.7],
         "mlp_multipliers": [0.9, 1.3], "key_multiplier": 0.8, "attention_in_multiplier": 1.2,
         "attention_out_multiplier": 0.7, "ssm_in_multiplier": 1.4, "ssm_out_multiplier": 0.6,
         "embedding_multiplier": 2.0, "lm_head_multiplier": 0.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    tiny.check(tmp_path, *TINY[name])
