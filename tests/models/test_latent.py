"""Models with latent attention: logits of tiny random checkpoints are those of transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny
from cpu_ops import MemoryTensor, cpu, error
from numpy_backend import NumpyBackend

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder
from gguf_run.models.kv_moves import export, restore, shift

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


def decoder(config: ModelConfig, tensors: Any, backend: Any, n_seq: int = 1) -> Decoder:
    kinds = [CacheType("f32", "f32")] * config.n_layer
    return Decoder(config, tensors, [backend] * config.n_layer, 128, n_seq=n_seq, cache_types=kinds)


def last(model: Decoder, ids: list[int], seq: int = 0) -> np.ndarray:
    [logits] = model.forward(ids, 1, seq)
    return logits.copy()


@pytest.mark.parametrize("name", ["V2-Lite", "V3"])
def test_contexts_of_two_sequences(name: str, tmp_path: Path) -> None:
    """A shift turns the ends of the rows. What is saved goes on elsewhere, with the same bits. Ids in turns."""
    tiny.make(tmp_path, *TINY[name])
    with tiny.opened(tmp_path) as (config, tensors):
        model, twin = (decoder(config, tensors, backend, 2) for backend in (cpu(2), NumpyBackend(np.float64)))
        found = []
        for each in (model, twin):
            last(each, tiny.IDS[:70], 1)
            assert shift(each.cache, 32, 32, 1) == 38
            both = each.step({0: tiny.IDS[:5], 1: tiny.IDS[70:73]})
            found.append(np.concatenate([both.copy(), last(each, tiny.IDS[5:7], 0)]))
        assert error(*found) < 1e-4
        parts = [(il, kind, bytes(data)) for il, kind, data in export(model.cache, 1)]
        assert {kind for _, kind, _ in parts} == {"k"}
        restore(model.cache, 41, parts, 0, None)
        np.testing.assert_array_equal(last(model, tiny.IDS[:3], 0), last(model, tiny.IDS[:3], 1))


def test_files_with_keys_and_values_merged(tmp_path: Path) -> None:
    """As old programs wrote them: one tensor for both, the sizes of plain attention."""
    tiny.make(tmp_path, *TINY["V3"])
    with tiny.open_checkpoint(tmp_path) as file:
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
        expected = tiny.logits(config, file.tensors, cpu(2), (20,))
        old, n_head = dict[str, Any](file.tensors), config.n_head
        for il in range(config.n_layer):
            k, v = (old.pop(f"blk.{il}.{name}.weight") for name in ("attn_k_b", "attn_v_b"))
            parts = [dequantize(t.blocks(), t.type).reshape(n_head, -1, t.ne[0]) for t in (k, v)]
            rows = np.concatenate([parts[0].swapaxes(1, 2), parts[1]], axis=1).reshape(-1, k.ne[1])
            name, data = f"blk.{il}.attn_kv_b.weight", np.ascontiguousarray(rows).view(np.uint8)
            old[name] = MemoryTensor(name, k.type, rows.shape[::-1], data)
        sizes = {"key_length": 32, "value_length": 20, "key_length_mla": None, "value_length_mla": None}
        changed = {f"deepseek2.attention.{key}": value for key, value in {**sizes, "head_count_kv": n_head}.items()}
        config = ModelConfig.from_metadata({**file.metadata, **changed}, old)
        assert error(tiny.logits(config, old, cpu(2), (20,)), expected) < 1e-6
