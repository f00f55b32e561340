"""Encoders: hidden states of tiny random checkpoints are those of transformers, and embeddings follow from them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from cpu_ops import cpu, error
from numpy_backend import NumpyBackend
from tiny import IDS

from gguf_run.models.backend import CacheType
from gguf_run.models.embedder import Embedder

pytest.importorskip("transformers")

S, F = "sliding_attention", "full_attention"
BERT = {"hidden_size": 96, "num_attention_heads": 6, "pad_token_id": 0, "tie_word_embeddings": True}
# name -> (transformers' model class, config beyond hf_tiny._COMMON)
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", BERT),
    "nomic-bert": ("NomicBertModel", BERT),
    "gemma-embedding": (
        "Gemma3TextModel",
        {"hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
         "num_hidden_layers": 3, "layer_types": [S, S, F], "sliding_window": 11, "query_pre_attn_scalar": 16,
         "use_bidirectional_attention": True, "tie_word_embeddings": True},
    ),
}  # fmt: skip


def expected(model: Any, ids: list[int]) -> np.ndarray:
    """transformers' hidden states f32[len(ids), n_embd]."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).last_hidden_state[0].numpy()


def embedder(folder: Path, backend: Any, n_ctx: int = 256, **metadata: Any) -> Embedder:
    with tiny.opened(folder, **metadata) as (config, tensors):
        kinds = [CacheType("f32", "f32")] * config.n_layer
        return Embedder(config, tensors, [backend] * config.n_layer, n_ctx, 8, cache_types=kinds)


@pytest.mark.parametrize("name", TINY)
def test_hidden_states_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = tiny.make(tmp_path, *TINY[name])
    found = {}
    for label, backend in (("float64", NumpyBackend(np.float64)), ("1 thread", cpu(1)), ("3 threads", cpu(3))):
        made = embedder(tmp_path, backend)
        for n in (90, 33, 2, 1):  # longer than n_batch, which is for prompts
            found[label, n] = error(made.hidden(IDS[:n], n), expected(model, IDS[:n]))
    assert max(found.values()) < 1e-4, found
