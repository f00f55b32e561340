"""Every architecture on the GPU backend, in Triton's interpreter: logits of tiny random checkpoints are those of
transformers in float32."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hf_tiny
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")
pytest.importorskip("transformers")

from cpu_ops import error
from gpu_ops import fast_dots, gpu

from gguf_run.kernels_gpu import attention_launch, program, recorder
from gguf_run.kernels_gpu import backend as gpu_backend
from gguf_run.kernels_gpu.matmul import Tuning
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder
from gguf_run.runtime.convert import open_checkpoint

__all__ = ["fast_dots"]
pytestmark = [
    pytest.mark.usefixtures("fast_dots"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # rows that only fill up may hold anything
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # the interpreter's own
]
IDS = [2, 12, 36, 74, 126]
WINDOW = {"sliding_window": 3}
LONG = {"original_max_position_embeddings": 4}  # so that 5 tokens are many
# name -> (checkpoint, its config beyond hf_tiny's, metadata beyond the converter's); "general.architecture" renames.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{name: (name, WINDOW if own.get("sliding_window") else {}, {}) for name, (_, own) in hf_tiny.TINY.items()},
    "mistral window": ("mistral", WINDOW, {"llama.attention.sliding_window": 3}),
    "mistral3": ("llama31", {}, {"general.architecture": "mistral3"}),
    "granitemoe": ("mixtral", {}, {"general.architecture": "granitemoe"}),
    "phi3-longrope": ("phi3-longrope", LONG | {"rope_parameters": hf_tiny._LONGROPE | LONG}, {}),
}
SLOW = "starcoder2"  # whose single token goes through matmul_float too, which takes the interpreter seconds


def renamed(metadata: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    old = metadata["general.architecture"]
    new = changes.get("general.architecture", old)
    return {re.sub(rf"^{old}\.", f"{new}.", key): value for key, value in metadata.items()} | dict(changes)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of 4 tokens, and one token after it, which a window makes forget the first ones."""
    for module in (attention_launch, program, recorder):
        monkeypatch.setattr(module, "FEW", 1 if module is not recorder or name == SLOW else 0)
    monkeypatch.setattr(gpu_backend, "DEFAULT", Tuning(tile=(256, 16)))  # the interpreter takes no longer
    checkpoint, own, metadata = CASES[name]
    expected = hf_tiny.logits(hf_tiny.make(checkpoint, tmp_path, **own), IDS)
    with open_checkpoint(tmp_path) as file:
        config = ModelConfig.from_metadata(renamed(file.metadata, metadata), file.tensors)
        kinds = [CacheType("f32", "f32")] * config.n_layer
        decoder = Decoder(config, file.tensors, [gpu()] * config.n_layer, 64, 4, 4, cache_types=kinds)
        parts = [block.copy() for ids in (IDS[:4], IDS[4:]) for block in decoder.forward(ids, len(ids))]
    # Experts of floats read activations as f16.
    assert error(np.concatenate(parts), expected) < (1e-3 if config.n_expert else 1e-5)
