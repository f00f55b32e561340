"""Every architecture on the CPU: the logits of a tiny random checkpoint are those of transformers in float32."""

from pathlib import Path

import hf_tiny
import numpy as np
import pytest
from cpu_ops import cpu, error

from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder
from gguf_run.runtime.convert.open_checkpoint import open_checkpoint

pytest.importorskip("torch")
pytest.importorskip("transformers")

IDS = [(7 * i * i + 3 * i + 2) % hf_tiny.N_VOCAB for i in range(40)]


@pytest.mark.parametrize("name", hf_tiny.TINY)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    expected = hf_tiny.logits(hf_tiny.make(name, tmp_path), IDS)
    with open_checkpoint(tmp_path) as file:
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
        kinds = [CacheType("f32", "f32")] * config.n_layer
        decoder = Decoder(config, file.tensors, [cpu(2)] * config.n_layer, 64, cache_types=kinds)
        parts = [IDS[:17], *([id] for id in IDS[17:20]), IDS[20:]]
        actual = np.concatenate([block.copy() for ids in parts for block in decoder.forward(ids, len(ids))])
    assert error(actual, expected) < 1e-3
