"""Qwen's hybrids: logits against transformers, and what a state must outlast: sessions, going back, other sequences."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import hf_tiny
import tiny
from cpu_ops import cpu, error
from gpu_ops import fast_dots, gpu, use_tuning
from numpy_backend import NumpyBackend
from texts import engine_over, prefill

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.kernels_cpu.backend import CpuBackend
from gguf_run.kernels_gpu import program
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder
from gguf_run.models.kv_moves import copy_prefix, export, restore
from gguf_run.runtime.convert.open_checkpoint import open_checkpoint
from gguf_run.runtime.convert.stored.sources import F32, computed
from gguf_run.runtime.load.memory import MemoryPlan

__all__ = ["fast_dots"]

IDS = [*tiny.IDS, *tiny.IDS[::-1]]
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


def remember(model: Any) -> None:
    """Let states decay slowly. As they are made, a token sees little but itself, and that is normed: noise grows."""
    for name, x in model.named_parameters():
        if name.endswith("A_log"):
            x.data.sub_(4.0)


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    tiny.check(tmp_path, *TINY[name], change=remember)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModelConfig, Any]]:
    folder = tmp_path_factory.mktemp("qwen35")
    tiny.make(folder, *TINY["qwen35"], change=remember)
    with tiny.opened(folder) as model:
        yield model


def decoder(model: tuple[ModelConfig, Any], backend: Any, n_ctx: int = 200, n_seq: int = 1) -> Decoder:
    config, tensors = model
    kinds = [CacheType("f32", "f32")] * config.n_layer
    return Decoder(config, tensors, [backend] * config.n_layer, n_ctx, 32, n_seq=n_seq, cache_types=kinds)


def last(model: Decoder, ids: Sequence[int], seq: int = 0) -> np.ndarray:
    (logits,) = (block[-1].copy() for block in model.forward(ids, 1, seq))
    return logits


def expected(model: tuple[ModelConfig, Any], ids: Sequence[int]) -> np.ndarray:
    return last(decoder(model, NumpyBackend(np.float64)), ids)


def test_sequences_of_one_step_go_back_and_are_copied_and_saved(qwen: Any) -> None:
    model = decoder(qwen, cpu(2), n_seq=3)
    texts = {0: IDS[:50], 1: IDS[5:8], 2: []}
    for seq, ids in texts.items():
        assert not [*model.forward(ids, 0, seq)]
    for step in ({1: [7, 8], 0: [5]}, {0: [1, 2, 3], 2: [9], 1: [4]}):
        rows = model.step(step).copy()
        for row, (seq, new) in zip(rows, step.items(), strict=True):
            texts[seq] = [*texts[seq], *new]
            assert error(row, expected(qwen, texts[seq])) < 2e-5
    for asked, left in ((52, 51), (50, 50), (40, 0)):
        assert model.rewind(asked) == left
        assert error(last(model, [*texts[0][left:asked], 6]), expected(qwen, [*texts[0][:asked], 6])) < 2e-5
        model.rewind(left)
    assert not [*model.forward(IDS[:60], 0)]
    assert copy_prefix(model.cache, 0, 2, 60) == 60
    restore(model.cache, 60, [(il, kind, bytes(data)) for il, kind, data in export(model.cache)], 1)
    last(model, [1])
    for seq in (1, 2):
        assert error(last(model, [3], seq), expected(qwen, [*IDS[:60], 3])) < 2e-5


def test_a_context_that_is_full_runs_what_stays_again(qwen: Any) -> None:
    """Nothing can be taken out of a state."""
    engine, text = engine_over(decoder(qwen, cpu(2), n_ctx=128)), [*IDS[:128], 5]
    logits, _ = prefill(engine, text, 0)
    assert engine.rows.cache.n_past() == 128 - 32 + 1
    assert error(logits, expected(qwen, [*IDS[:32], *IDS[64:128], 5])) < 2e-5
    logits, n_reused = prefill(engine, [*text, 6, 7], 0)
    assert n_reused == len(text)
    assert error(logits, expected(qwen, [*IDS[:32], *IDS[64:128], 5, 6, 7])) < 2e-5


def test_the_memory_of_states_is_planned(qwen: Any) -> None:
    config, tensors = qwen
    plan = MemoryPlan(config, list(tensors.values()), 200, [CacheType("f32", "f32")] * config.n_layer, 32, 2)
    own = CpuBackend(1)
    held = decoder(qwen, own, n_seq=2).nbytes()["cache"]
    own.close()
    assert plan.cache_bytes() == held
    assert held > 4 * 2 * 3 * (3 * 160 + 6 * 16 * 16) * 4


def test_old_files_have_one_matrix_of_all_parts(tmp_path: Path) -> None:
    """Qwen 3 Next: ssm_in has for each head of k its q, k, v and z."""
    tiny.make(tmp_path, *TINY["qwen3next"], change=remember)
    with open_checkpoint(tmp_path) as file:
        config, old = ModelConfig.from_metadata(file.metadata, file.tensors), dict(file.tensors)
        wanted = tiny.logits(config, old, cpu(2), (90,))
        for il in (0, 1, 2):
            names = (f"blk.{il}.{name}.weight" for name in ("attn_qkv", "attn_gate"))
            qkv, z = (dequantize(old.pop(name).blocks(), F32) for name in names)
            q, k, v = qkv[:32], qkv[32:64], qkv[64:]
            parts = [x.reshape(2, -1, 72) for x in (q, k, v, z)]
            name = f"blk.{il}.ssm_in.weight"
            old[name] = computed(name, np.concatenate(parts, 1).reshape(-1, 72), tmp_path)
        config = ModelConfig.from_metadata(file.metadata, old)
        assert np.array_equal(tiny.logits(config, old, cpu(2), (90,)), wanted)


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning")
def test_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast_dots: None) -> None:
    """Two layers, of which the file lists the kinds. Products of few tokens run as those of many, which is quicker."""
    monkeypatch.setattr(program, "FEW", 0)
    use_tuning(monkeypatch, tile=(256, 16))
    class_name, config = TINY["qwen35"]
    two = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    model = tiny.make(tmp_path, class_name, config | two, remember)
    with tiny.opened(tmp_path) as (made, tensors):
        found = tiny.logits(made, tensors, gpu(), (3, 1), tiny.IDS[:4])
    assert error(found, hf_tiny.logits(model, tiny.IDS[:4])) < 1e-4


def test_the_next_prompt_of_a_chat_is_not_computed_from_its_beginning(qwen: Any) -> None:
    """It parts from the last one at the start of the answer, and the answer was long."""
    engine, text = engine_over(decoder(qwen, cpu(2))), list(IDS[:63])
    prefill(engine, text)
    for i in range(90):
        text.append(i)
        prefill(engine, text)
    prompt = [*IDS[:59], *IDS[100:110]]
    logits, n_reused = prefill(engine, prompt)
    assert n_reused == 48
    assert error(logits, expected(qwen, prompt)) < 2e-5
