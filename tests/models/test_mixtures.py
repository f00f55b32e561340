"""Mixtures of experts of this year: logits of tiny checkpoints are those of transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import hf_tiny
import tiny
from cpu_ops import cpu, error
from numpy_backend import NumpyBackend
from safetensors.numpy import load_file, save_file

from gguf_run.models.backend import CacheType
from gguf_run.models.decoder import Decoder
from gguf_run.runtime.convert.open_checkpoint import open_checkpoint
from gguf_run.runtime.convert.stored.sources import computed

_SIZES = {"hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
_MOE = {**_SIZES, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
_LEAD = {**_MOE, "n_routed_experts": 8, "first_k_dense_replace": 1}
_VISION = {
    "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 72,
    "deepstack_visual_indexes": [0],
}  # fmt: skip
_MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]}
_GROUPS = {"n_group": 4, "topk_group": 2}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "dots1": (
        "Dots1ForCausalLM",
        {**_LEAD, "num_key_value_heads": 6, "n_shared_experts": 2, "routed_scaling_factor": 2.5},
    ),
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
    "hunyuan-moe": (
        "HunYuanMoEV1ForCausalLM", {**_SIZES, "num_experts": 4, "moe_topk": [2, 2], "num_shared_expert": [1, 1]}
    ),
    "qwen3vlmoe": (
        "Qwen3VLMoeForConditionalGeneration",
        {"text_config": {**_MOE, "num_experts": 8, "rope_parameters": _MROPE}, "vision_config": _VISION},
    ),
    "afmoe": (
        "AfmoeForCausalLM",
        {**_MOE, "num_hidden_layers": 4, "num_experts": 8, "num_dense_layers": 1, "mup_enabled": True,
         "route_scale": 1.7, "sliding_window": 8},
    ),
    "phimoe": (
        "PhimoeForCausalLM",
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "num_local_experts": 8,
         "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True, "max_position_embeddings": 1024,
         "rope_parameters": {**hf_tiny._LONGROPE, "short_mscale": 1.3, "long_mscale": 1.3}},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        {**_SIZES, "num_hidden_layers": 4, "intermediate_size_mlp": 104, "intermediate_size": 40,
         "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
         "attention_chunk_size": 16, "floor_scale": 16},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*tensors for images, sound or drafts are left out")
@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    tiny.check(tmp_path, *TINY[name])


def rewrite(
    folder: Path, config: dict[str, Any], edit: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
) -> None:
    """Change the tensors of a checkpoint, and values of its config.json."""
    path = folder / "model.safetensors"
    save_file({name: np.ascontiguousarray(x) for name, x in edit(load_file(path)).items()}, path)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))


def as_ling(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Ling 2's names for what GLM 4.5 computes, q, k and v in one matrix, and a block that drafts tokens."""
    names = {
        "embed_tokens": "word_embeddings", "e_score_correction_bias": "expert_bias", "self_attn": "attention",
        "o_proj": "dense", "q_norm": "query_layernorm", "k_norm": "key_layernorm",
    }  # fmt: skip
    found = {}
    for name, x in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new)
        found[name] = x
    for il in range(2):
        block = f"model.layers.{il}.attention."
        found[f"{block}query_key_value.weight"] = np.concatenate([found.pop(f"{block}{c}_proj.weight") for c in "qkv"])
    return {**found, "model.layers.2.eh_proj.weight": np.ones((2, 2), np.float32)}


@pytest.mark.filterwarnings("ignore:.*tensors for images, sound or drafts are left out")
def test_ling(tmp_path: Path) -> None:
    """transformers has no class for it. Blocks that draft tokens are left out."""
    _, config = TINY["glm4moe"]
    expected = hf_tiny.logits(tiny.make(tmp_path, "Glm4MoeForCausalLM", config), tiny.IDS)
    own = {"architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe", "num_experts": 8}
    own |= {"num_shared_experts": 1, "n_shared_experts": None, "n_routed_experts": None, "score_function": None}
    rewrite(tmp_path, {**own, "num_nextn_predict_layers": 1}, as_ling)
    with pytest.warns(UserWarning, match="1 tensors for images, sound or drafts are left out"):
        open_checkpoint(tmp_path)
    with tiny.opened(tmp_path) as (model, tensors):
        assert (model.arch.name, model.moe.n_group, model.n_layer) == ("bailingmoe2", 4, 2)
        assert error(tiny.logits(model, tensors, cpu(2), (65, 25)), expected) < 1e-4


@pytest.mark.filterwarnings("ignore:.*tensors for images, sound or drafts are left out")
def test_experts_whose_matrices_are_turned(tmp_path: Path) -> None:
    """The first checkpoints of Qwen3-VL have [n_in, n_out], those that transformers 5 writes [n_out, n_in]."""
    tiny.make(tmp_path, *TINY["qwen3vlmoe"])
    turned = {}
    for _ in range(2):
        with tiny.opened(tmp_path) as (_, tensors):
            turned[len(turned)] = {name: tensor.blocks().copy() for name, tensor in tensors.items()}
        rewrite(tmp_path, {}, lambda x: {k: v.swapaxes(1, 2) if ".experts." in k else v for k, v in x.items()})
    for name, blocks in turned[0].items():
        np.testing.assert_array_equal(turned[1][name], blocks)


def test_gate_and_up_in_one_tensor(tmp_path: Path) -> None:
    """Any architecture may have that."""
    tiny.make(tmp_path, *TINY["dots1"])
    with tiny.opened(tmp_path) as (config, tensors):
        expected = tiny.logits(config, tensors, cpu(2), (90,))
        gate, up = (f"blk.1.ffn_{name}_exps.weight" for name in ("gate", "up"))
        parts = [tensors[name].blocks().view(np.float32).reshape(8, 40, 72) for name in (gate, up)]
        fewer = {name: tensor for name, tensor in tensors.items() if name not in (gate, up)}
        both = "blk.1.ffn_gate_up_exps.weight"
        fewer[both] = computed(both, np.concatenate(parts, axis=1), tmp_path)
        np.testing.assert_array_equal(tiny.logits(config, fewer, cpu(2), (90,)), expected)


def test_experts_elsewhere(tmp_path: Path) -> None:
    """The sum of the experts is normed where the experts are."""
    tiny.make(tmp_path, *TINY["afmoe"])
    with tiny.opened(tmp_path) as (config, tensors):
        expected = tiny.logits(config, tensors, cpu(2), (90,))
        kinds = [CacheType("f32", "f32")] * config.n_layer
        own, others = [NumpyBackend(np.float64)] * config.n_layer, [cpu(2)] * config.n_layer
        decoder = Decoder(config, tensors, own, 96, cache_types=kinds, experts=others)
        found = np.concatenate([block.copy() for block in decoder.forward(tiny.IDS, len(tiny.IDS))])
        assert error(found, expected) < 1e-5
