"""Encoders on the GPU backend, in Triton's interpreter: hidden states of tiny checkpoints are those of transformers."""

from pathlib import Path
from typing import Any

import pytest
import tiny

pytest.importorskip("transformers")

import torch
from cpu_ops import error
from gpu_ops import fast_dots, gpu, pytestmark, use_tuning

from gguf_run.kernels_gpu import buffers, program
from gguf_run.models.backend import CacheType
from gguf_run.models.embedder import Embedder

__all__ = ["fast_dots", "pytestmark"]
BERT = {"hidden_size": 96, "num_attention_heads": 6, "pad_token_id": 0, "num_hidden_layers": 1}
GEMMA = {
    "hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 1,
    "layer_types": ["sliding_attention"], "sliding_window": 3, "use_bidirectional_attention": True, "pad_token_id": 0,
}  # fmt: skip
CASES = {"bert": ("BertModel", BERT), "nomic": ("NomicBertModel", BERT), "gemma": ("Gemma3TextModel", GEMMA)}


@pytest.mark.parametrize("name", CASES)
def test_hidden_states_are_those_of_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "FEW", 1)
    monkeypatch.setattr(program, "FEW", 0)
    use_tuning(monkeypatch, tile=(256, 16))
    class_name, own = CASES[name]
    model: Any = tiny.make(tmp_path, class_name, {**own, "tie_word_embeddings": True})
    ids = [2, 12, 36, 74]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).last_hidden_state[0].numpy()
    with tiny.opened(tmp_path) as (config, tensors):
        made = Embedder(config, tensors, [gpu()], 64, cache_types=[CacheType("f32", "f32")])
        assert error(made.hidden(ids, 4), expected) < 1e-5
