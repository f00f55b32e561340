"""Whole models on the GPU backend, in Triton's interpreter, against the CPU backend and NumPy."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from cpu_ops import cpu
from gpu_ops import fast_dots, gpu
from numpy_backend import NumpyBackend
from real import smollm2
from tinymodel import ALL_BIASES, TINY_GEMMA3, Tiny, write_tiny

from gguf_run.formats.reader import GGUFFile
from gguf_run.kernels_gpu import backend as gpu_backend
from gguf_run.kernels_gpu.matmul import Tuning
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder

__all__ = ["fast_dots"]
pytestmark = [
    pytest.mark.usefixtures("fast_dots"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # rows that only fill up may hold anything
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # the interpreter's own
]
LLAMA = Tiny(n_layer=1, n_embd=64, n_head=2, n_head_kv=1, n_ff=32, type="Q8_0", biases=ALL_BIASES)
MODELS = {
    "llama": replace(LLAMA, types={"attn_v": "Q5_1", "ffn_down": "F16"}),
    "gemma3": replace(TINY_GEMMA3, n_layer=1, window=0, type="Q4_0", types={"attn_v": "F32"}),
}
IDS = [(7 * i * i + 3 * i + 1) % 270 for i in range(12)]


def open_decoder(path: Path, backend: Any, n_layer: int | None = None) -> Decoder:
    """n_layer: the first so many only."""
    file = GGUFFile.open(path)
    config = ModelConfig.from_metadata(file.metadata, file.tensors)
    config = replace(config, n_layer=n_layer or config.n_layer)
    return Decoder(config, file.tensors, [backend] * config.n_layer, 64, n_batch=32, n_outputs=16)


def logits(decoder: Decoder, ids: Sequence[int], n_outputs: int) -> np.ndarray:
    return np.concatenate([block.copy() for block in decoder.forward(ids, n_outputs)])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(((a - b) ** 2).mean() / (b**2).mean()))


@pytest.mark.parametrize("name", MODELS)
def test_tiny_models(name: str, tmp_path: Path) -> None:
    """A batch, with f16 activations, and one token with int8 ones, which cost as much accuracy as on the CPU."""
    write_tiny(tmp_path / "model.gguf", MODELS[name])
    one, other, exact = (
        open_decoder(tmp_path / "model.gguf", backend) for backend in (gpu(), cpu(2), NumpyBackend(np.float64))
    )
    batches = [logits(decoder, IDS[:11], 11) for decoder in (one, other, exact)]
    assert distance(batches[0], batches[2]) < 3e-3
    assert distance(batches[0], batches[1]) < 0.05
    if name == "llama":
        singles = [logits(decoder, IDS[11:], 1) for decoder in (one, other, exact)]
        assert distance(singles[0], singles[2]) < max(0.01, 1.5 * distance(singles[1], singles[2]))


def test_launches_of_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token and one layer more: 7 launches."""
    from triton.runtime.interpreter import GridExecutor

    launched: list[str] = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *_, **__: launched.append(self.fn.__name__))
    write_tiny(tmp_path / "model.gguf", replace(LLAMA, n_layer=3, n_head=2, n_embd=64))
    counts = []
    for n_layer in (1, 2, 3):
        launched.clear()
        logits(open_decoder(tmp_path / "model.gguf", gpu(), n_layer), [5], 1)
        counts.append(launched.copy())
    assert [len(more) - len(few) for few, more in itertools.pairwise(counts)] == [7, 7], counts[-1]


def test_two_layers_of_a_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2, Q4_1: large tiles, because the interpreter takes no longer for them."""
    monkeypatch.setattr(gpu_backend, "DEFAULT", Tuning(tile=(1024, 32)))
    ids = [1, 4093, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712]
    one, other = (open_decoder(smollm2(), backend, n_layer=2) for backend in (gpu(), cpu(2)))
    a, b = (logits(decoder, ids, 12) for decoder in (one, other))
    assert distance(a, b) < 0.03
    assert (a.argmax(-1) == b.argmax(-1)).mean() > 0.7
