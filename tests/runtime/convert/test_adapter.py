"""PEFT adapters as GGUF adapters: logits are those of transformers with the products added to its weights."""

import json
import math
from pathlib import Path
from typing import Any

import hf_tiny
import numpy as np
import pytest
from cpu_ops import cpu, error
from numpy_backend import NumpyBackend
from peft_files import write_peft
from quantpack import write_safetensors

from gguf_run.formats.errors import FormatError, GgufRunError, UnsupportedError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.models.adapted_step import Adapters
from gguf_run.models.adapters import read_adapter
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder
from gguf_run.runtime.convert.adapter import open_adapter
from gguf_run.runtime.convert.open_checkpoint import auto_type, open_checkpoint
from gguf_run.runtime.quantize.file import quantize_file
from gguf_run.runtime.quantize.file_types import FILE_TYPES
from gguf_run.runtime.quantize.plan import Options, make_plan

IDS = [(7 * i * i + 3 * i + 2) % hf_tiny.N_VOCAB for i in range(12)]


def random_pairs(model: Any, words: tuple[str, ...], ranks: dict[str, int]) -> dict[str, Any]:
    """Pairs for all modules whose names end with one of the words. ranks: by the end of the name; else 4."""
    rng, pairs = np.random.default_rng(5), {}
    for name, w in model.named_parameters():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.endswith(words):
            rank = next((r for end, r in ranks.items() if module.endswith(end)), 4)
            a, b = rng.standard_normal((rank, w.shape[1])) / 10, rng.standard_normal((w.shape[0], rank)) / 10
            pairs[module] = a.astype(np.float32), b.astype(np.float32)
    return pairs


def merge(model: Any, pairs: dict[str, Any], scales: dict[str, float], scale: float) -> None:
    """Add the products to the weights. scales: by the end of a module's name, in place of `scale`."""
    import torch

    modules = dict(model.named_modules())
    with torch.no_grad():
        for module, (a, b) in pairs.items():
            by = next((one for end, one in scales.items() if module.endswith(end)), scale)
            w = modules[module].weight
            w.copy_(torch.from_numpy(w.double().numpy() + by * b.astype(np.float64) @ a.astype(np.float64)))


def convert(folder: Path, base: Path | None, kind: str = "F32") -> None:
    """Write adapter.gguf beside a PEFT adapter."""
    with open_adapter(folder, base) as file:
        plan = make_plan(file, Options(auto_type(file) if kind == "auto" else FILE_TYPES[kind]))
        quantize_file(plan, folder.parent / "adapter.gguf", 1, lambda done, total: None)


def found_logits(folder: Path, adapter: Path, backend: Any) -> np.ndarray:
    with open_checkpoint(folder) as file, GGUFFile.open(adapter) as lora:
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
        held = read_adapter("x", lora, str(file.metadata["general.architecture"]), file.tensors)
        kinds, backends = [CacheType("f32", "f32")] * config.n_layer, [backend] * config.n_layer
        made = Decoder(config, file.tensors, backends, 32, cache_types=kinds, adapters=Adapters([(held, 1.0)], 1))
        return np.concatenate([block.copy() for block in made.forward(IDS, len(IDS))])


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
NETWORK = ("gate_proj", "up_proj", "down_proj")
# architecture -> modules that are adapted. Llama's and SmolLM3's q and k have rows in another order in GGUF files.
CASES = {
    "llama": (*ATTENTION, *NETWORK, "lm_head"),
    "smollm3": (*ATTENTION, *NETWORK),
    "qwen3": ("q_proj", "v_proj"),
    "gemma2": (*ATTENTION, *NETWORK),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "qwen2moe": (*ATTENTION, "shared_expert.up_proj", "shared_expert.down_proj"),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = hf_tiny.make(name, tmp_path / "base")
    before = hf_tiny.logits(model, IDS)
    model = _copied(model)
    pairs = random_pairs(model, CASES[name], {})
    write_peft(tmp_path / "adapter", pairs)
    merge(model, pairs, {}, 12 / 4)
    expected = hf_tiny.logits(model, IDS)
    assert error(before, expected) > 0.05
    convert(tmp_path / "adapter", tmp_path / "base")
    for backend in (NumpyBackend(np.float64), cpu(2)):
        assert error(found_logits(tmp_path / "base", tmp_path / "adapter.gguf", backend), expected) < 1e-4


def _copied(model: Any) -> Any:
    import copy

    return copy.deepcopy(model)  # hf_tiny makes each model once


@pytest.mark.parametrize("is_root", [False, True], ids=["alpha / r", "alpha / sqrt(r)"])
def test_patterns_of_ranks_and_alphas(is_root: bool, tmp_path: Path) -> None:
    model = _copied(hf_tiny.make("llama", tmp_path / "base"))
    pairs = random_pairs(model, ("q_proj", "up_proj", "down_proj"), {"q_proj": 2, "layers.1.mlp.up_proj": 9})
    patterns = {"alpha_pattern": {"up_proj": 5, "layers.0.mlp.down_proj": 1.5}}
    write_peft(tmp_path / "adapter", pairs, use_rslora=is_root, rank_pattern={"q_proj": 2}, **patterns)
    scales = {}
    for module, (a, _) in pairs.items():
        alpha = 5.0 if module.endswith("up_proj") else 1.5 if module.endswith("layers.0.mlp.down_proj") else 12.0
        scales[module] = alpha / (math.sqrt(len(a)) if is_root else len(a))
    merge(model, pairs, scales, 0.0)
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "weights")  # its numbers are enough
    convert(tmp_path / "adapter", tmp_path / "base")
    (tmp_path / "weights").rename(tmp_path / "base" / "model.safetensors")
    found = found_logits(tmp_path / "base", tmp_path / "adapter.gguf", NumpyBackend(np.float64))
    assert error(found, hf_tiny.logits(model, IDS)) < 1e-4


def test_types(tmp_path: Path) -> None:
    hf_tiny.plain_llama(tmp_path / "base")
    pair = {"model.layers.0.self_attn.o_proj": (np.ones((4, 256), np.float32), np.ones((256, 4), np.float32))}
    bits = {
        name: tuple((half.view(np.uint32) >> 16).astype(np.uint16) for half in halves) for name, halves in pair.items()
    }
    write_peft(tmp_path / "f32", pair, base_model_name_or_path=str(tmp_path / "base"))
    write_peft(tmp_path / "bf16", bits, "BF16", base_model_name_or_path=str(tmp_path / "base"))
    cases = (("f32", "auto", "F16"), ("f32", "F32", "F32"), ("bf16", "auto", "BF16"), ("bf16", "F16", "F16"))
    for folder, kind, found in cases:
        convert(tmp_path / folder, None, kind)
        with GGUFFile.open(tmp_path / "adapter.gguf") as file:
            assert {tensor.type.name for tensor in file.tensors.values()} == {found}
            assert {tensor.name: tensor.ne for tensor in file.tensors.values()} == {
                "blk.0.attn_output.weight.lora_a": (256, 4), "blk.0.attn_output.weight.lora_b": (4, 256),
            }  # fmt: skip
            assert file.metadata.items() >= {
                "general.type": "adapter", "general.architecture": "llama", "general.name": folder,
                "adapter.type": "lora", "adapter.lora.alpha": 12.0,
            }.items()  # fmt: skip


O_PROJ = "model.layers.0.self_attn.o_proj"


def halves(rank: int = 4, n: int = 256) -> tuple[Any, Any]:
    return np.ones((rank, n), np.float32), np.ones((256, rank), np.float32)


@pytest.mark.parametrize(
    ("pairs", "config", "kind", "words"),
    [
        ({O_PROJ: halves()}, {"peft_type": "LOHA"}, FormatError, 'peft_type is "LOHA", must be "LORA"'),
        ({O_PROJ: halves()}, {"use_dora": True}, UnsupportedError, "use_dora is true, must be left out"),
        ({O_PROJ: halves()}, {"bias": "all"}, UnsupportedError, 'bias is "all", must be left out'),
        ({O_PROJ: halves()}, {"modules_to_save": ["lm_head"]}, UnsupportedError, "modules_to_save is .*, must be left"),
        ({O_PROJ: halves()}, {"alpha_pattern": {".*q": 3}}, UnsupportedError, "alpha_pattern is .* without signs of"),
        ({O_PROJ: halves()}, {"lora_alpha": 0}, FormatError, "lora_alpha is 0, must be a number other than 0"),
        ({O_PROJ: halves()}, {"r": 0}, FormatError, "r is 0, must be a whole number from 1"),
        ({O_PROJ: halves()[:1]}, {}, FormatError, "o_proj. must have .lora_A.weight and .lora_B.weight, which"),
        ({O_PROJ: (halves()[0], halves(3)[1])}, {}, FormatError, "which share a rank"),
        ({"model.embed_tokens": halves()}, {}, UnsupportedError, "GGUF file token_embd.weight: experts, embeddings"),
        ({"model.layers.7.self_attn.o_proj": halves()}, {}, UnsupportedError, "is not a part of a llama model of 2"),
        ({}, {}, FormatError, "holds no tensors"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted(
    pairs: dict[str, Any], config: dict[str, Any], kind: type[GgufRunError], words: str, tmp_path: Path
) -> None:
    hf_tiny.plain_llama(tmp_path / "base")
    write_peft(tmp_path / "adapter", pairs, **config)
    with pytest.raises(kind, match=words):
        open_adapter(tmp_path / "adapter", tmp_path / "base")


def test_other_tensors_and_folders(tmp_path: Path) -> None:
    hf_tiny.plain_llama(tmp_path / "base")
    write_peft(tmp_path / "adapter", {O_PROJ: halves()})
    with pytest.raises(GgufRunError, match=r'_config.json: name a folder with .*--base, not "somebody/model"'):
        open_adapter(tmp_path / "adapter", None)
    with pytest.raises(GgufRunError, match=r"name a folder with .*, not .*nowhere"):
        open_adapter(tmp_path / "adapter", tmp_path / "nowhere")
    magnitudes = {f"base_model.model.{O_PROJ}.lora_magnitude_vector": ("F32", np.ones(256, np.float32))}
    write_safetensors(tmp_path / "adapter" / "adapter_model.safetensors", magnitudes)
    with pytest.raises(UnsupportedError, match=r"lora_magnitude_vector. of the shape \[256\] is no half of a plain"):
        open_adapter(tmp_path / "adapter", tmp_path / "base")
    experts = {"model.layers.0.mlp.experts.0.up_proj": halves()}
    write_peft(tmp_path / "adapter", experts)
    hf_tiny.write_tokenizer(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config |= {"architectures": ["Qwen2MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 256}))
    with pytest.raises(UnsupportedError, match=r"in a GGUF file blk.0.ffn_up_exps.weight: experts, embeddings"):
        open_adapter(tmp_path / "adapter", tmp_path / "base")
