"""Layers with a short convolution or Mamba 2 in place of attention, or beside it: random checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny
from cpu_ops import cpu, error

from gguf_run.models.backend import CacheType
from gguf_run.models.decoder import Decoder

_SIZES = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}
_LFM2 = {**_SIZES, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "norm_eps": 1e-3}
_MAMBA = {"mamba_n_heads": 12, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2}
# The residual stream is small and eps is large: a norm with the eps of another place shows.
_GRANITE = {
    **_SIZES, **_MAMBA, "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "shared_intermediate_size": 56, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.4,
    "attention_multiplier": 0.2, "rms_norm_eps": 1e-3,
}  # fmt: skip
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_NEMOTRON = {
    **_SIZES, "head_dim": 32, "mamba_num_heads": 8, "mamba_head_dim": 20, "ssm_state_size": 16, "n_groups": 2,
    "time_step_min": 1e-9, "layer_norm_epsilon": 1e-3,
}  # fmt: skip
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("Lfm2ForCausalLM", _LFM2),
    "lfm2moe": (
        "Lfm2MoeForCausalLM",
        {**_LFM2, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "num_dense_layers": 1,
         "routed_scaling_factor": 1.0},
    ),
    "granitehybrid": ("GraniteMoeHybridForCausalLM", {**_GRANITE, "num_local_experts": 0}),
    "granitehybrid-moe": ("GraniteMoeHybridForCausalLM", {**_GRANITE, **_EXPERTS}),
    "granite-4": (
        "GraniteMoeHybridForCausalLM",
        {**_GRANITE, "num_local_experts": 0, "layer_types": ["full_attention"] * 3, "position_embedding_type": "rope"},
    ),
    "granitemoe": (
        "GraniteMoeHybridForCausalLM",
        {**_GRANITE, **_EXPERTS, "layer_types": ["full_attention"] * 3, "position_embedding_type": "rope"},
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        {**_NEMOTRON, "layers_block_type": ["linear_attention", "full_attention", "mlp", "linear_attention"]},
    ),
    "nemotron_h_moe": (
        "NemotronHForCausalLM",
        {**_NEMOTRON, "layers_block_type": ["linear_attention", "full_attention", "moe", "linear_attention"],
         "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "routed_scaling_factor": 1.7,
         "moe_shared_expert_intermediate_size": 56},
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


def decoder(folder: Path, name: str, backend: Any, n_seq: int = 1) -> Decoder:
    """A decoder of a random checkpoint. Its cache is of f32."""
    tiny.make(folder, *TINY[name])
    with tiny.opened(folder) as (config, tensors):
        kinds = [CacheType("f32", "f32")] * config.n_layer
        return Decoder(config, tensors, [backend] * config.n_layer, 96, n_seq=n_seq, cache_types=kinds)


def run(model: Decoder, ids: Sequence[int], seq: int = 0) -> np.ndarray:
    """The logits of all ids."""
    return np.concatenate([block.copy() for block in model.forward(ids, len(ids), seq)])


@pytest.mark.parametrize("name", ["lfm2", "granitehybrid", "nemotron_h", "falcon-h1"])
def test_sequences_do_not_see_each_other(name: str, tmp_path: Path) -> None:
    """Steps with runs of different lengths; a sequence pauses, goes back, is copied, and is saved and loaded."""
    model, ids = decoder(tmp_path, name, cpu(2), n_seq=3), tiny.IDS
    alone = run(model, ids[:40])
    others = run(model, ids[40:80], 1)
    model.rewind(0), model.rewind(0, 1)
    for at, batch in ((20, {0: ids[:20], 1: ids[40:41]}), (22, {0: ids[20:22]}), (23, {0: ids[22:23], 1: ids[41:60]})):
        result = model.step(batch)
        assert error(result[:1], alone[at - 1 : at]) < 1e-5
    assert error(result[1:], others[19:20]) < 1e-5
    saved = [(il, kind, bytes(data)) for il, kind, data in model.cache.export(0)]
    model.cache.load(23, saved, 2, ids[:23])
    assert model.cache.copy_prefix(0, 1, 23) == 23
    for seq in range(3):
        assert error(run(model, ids[23:40], seq), alone[23:]) < 1e-5
    n_left = model.rewind(30)
    assert n_left <= 30
    assert error(run(model, ids[n_left:40]), alone[n_left:]) < 1e-5
    model.close()
