"""Every architecture on the GPU backend, in Triton's interpreter: logits of tiny random checkpoints are those of
transformers in float32."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_tiny
import numpy as np
import pytest
import tiny

pytest.importorskip("transformers")

from cpu_ops import cpu, error, tensor_of
from gpu_ops import fast_dots, gpu, pytestmark, use_tuning

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.quantizers.quantizer import quantize
from gguf_run.kernels_gpu import program
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder
from gguf_run.runtime.convert.open_checkpoint import open_checkpoint

__all__ = ["fast_dots", "pytestmark"]
IDS = [2, 12, 36, 74]
WINDOW = {"sliding_window": 3}
LONG = {"original_max_position_embeddings": 3}  # so that 4 tokens are many
SEVERAL = ("llama", "gemma2", "gemma3", "smollm3", "deepseek", "gpt-oss")  # the others' layers are alike: one will do
# name -> (checkpoint, its config beyond hf_tiny's, metadata beyond the converter's); "general.architecture" renames.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{name: (name, WINDOW if own.get("sliding_window") else {}, {}) for name, (_, own) in hf_tiny.TINY.items()},
    "mistral window": ("mistral", WINDOW, {"llama.attention.sliding_window": 3}),
    "mistral3": ("llama31", {}, {"general.architecture": "mistral3"}),
    "granitemoe": ("mixtral", {}, {"general.architecture": "granitemoe"}),
    "phi3-longrope": ("phi3-longrope", LONG | {"rope_parameters": hf_tiny._LONGROPE | LONG}, {}),
}


def renamed(metadata: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    old = metadata["general.architecture"]
    new = changes.get("general.architecture", old)
    return {re.sub(rf"^{old}\.", f"{new}.", key): value for key, value in metadata.items()} | dict(changes)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of 3 tokens, and one token after it, which a window makes forget the first ones. Products of single
    tokens, which take the interpreter seconds, go as those of many."""
    monkeypatch.setattr(program, "FEW", 0)
    use_tuning(monkeypatch, tile=(256, 16))
    checkpoint, own, metadata = CASES[name]
    own = own if checkpoint in SEVERAL else own | {"num_hidden_layers": 1}
    model = hf_tiny.make(checkpoint, tmp_path, **own)
    # LongRoPE: the first tokens have been answered when the sequence becomes a long one.
    expected = np.concatenate([hf_tiny.logits(model, IDS[:3]), hf_tiny.logits(model, IDS)[3:]])
    with open_checkpoint(tmp_path) as file:
        config = ModelConfig.from_metadata(renamed(file.metadata, metadata), file.tensors)
        kinds = [CacheType("f32", "f32")] * config.n_layer
        decoder = Decoder(config, file.tensors, [gpu()] * config.n_layer, 64, 4, 4, cache_types=kinds)
        parts = [block.copy() for ids in (IDS[:3], IDS[3:]) for block in decoder.forward(ids, len(ids))]
    # Experts of floats read activations as f16.
    assert error(np.concatenate(parts), expected) < (1e-3 if config.n_expert else 1e-5)


LATE = {"hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 1}


# A layer that reads the keys and values of the one before, for the wanted tokens only.
SHARED = {
    "hidden_size": 72, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 32,
    "layer_types": ["full_attention"] * 2, "num_kv_shared_layers": 1, "hidden_size_per_layer_input": 24,
    "vocab_size_per_layer_input": 300, "intermediate_size": 40, "tie_word_embeddings": True,
}  # fmt: skip
ALONE = {"norms after the rotation": ("HunYuanDenseV1ForCausalLM", LATE), "shared": ("Gemma4ForCausalLM", SHARED)}


@pytest.mark.parametrize("name", ALONE)
def test_logits_of_new_kinds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "FEW", 0)
    use_tuning(monkeypatch, tile=(256, 16))
    model = tiny.make(tmp_path, *ALONE[name])
    with tiny.opened(tmp_path) as (config, tensors):
        assert error(tiny.logits(config, tensors, gpu(), (3, 1), IDS), hf_tiny.logits(model, IDS)) < 1e-5


SMALL = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 32}
SMALL |= {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
# One for each order of norms, products and activations, which are fused for a few tokens and quantized weights.
FUSED = ("gemma3", "olmo2", "stablelm-parallel", "starcoder2")


def small(tensor: Any) -> Any:
    """A matrix as Q8_0, in memory, for 32 tokens only."""
    if len(tensor.ne) != 2:
        return tensor
    values = dequantize(tensor.blocks(), tensor.type).reshape(tensor.n_rows, -1)
    kept = values[:32] if tensor.n_rows == hf_tiny.N_VOCAB else values
    return replace(tensor_of(quantize(kept, "Q8_0"), "Q8_0"), name=tensor.name)


@pytest.mark.parametrize("name", FUSED)
def test_quantized_logits_are_those_of_the_cpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token: activations are int8 on both."""
    use_tuning(monkeypatch, rows=((1, 16),))
    hf_tiny.make(name, tmp_path, **SMALL | ({"query_pre_attn_scalar": 32} if name == "gemma3" else {}))
    with open_checkpoint(tmp_path) as file:
        tensors = {name: small(tensor) for name, tensor in file.tensors.items()}
        config = ModelConfig.from_metadata(file.metadata, tensors)
        kinds, results = [CacheType("f32", "f32")] * config.n_layer, []
        for backend in (gpu(), cpu(2)):
            decoder = Decoder(config, tensors, [backend] * config.n_layer, 64, 4, 4, cache_types=kinds)
            results += [block.copy() for block in decoder.forward(IDS[:1])]
    assert error(*results) < 1e-5
