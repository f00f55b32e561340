"""Adapters of low rank: logits are those of a model with the product of both halves in its weights."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import merged, random_pairs, write_adapter
from cpu_ops import cpu, error
from numpy_backend import NumpyBackend
from tinymodel import ALL_BIASES, TINY_GEMMA3, WIDE_LLAMA, Tiny, write_tiny

from gguf_run.formats.errors import FormatError, GgufRunError, OptionError, UnsupportedError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.models.adapted_step import Adapters
from gguf_run.models.adapters import read_adapter
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder

IDS = [(7 * i * i + 3 * i + 1) % 270 for i in range(24)]
ALL = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), 8)
UNEVEN = {"attn_q": 1, "attn_v": 5, "ffn_up": 17, "ffn_down": 3}  # k and gate have none
LLAMA = Tiny(biases=ALL_BIASES, tied=False)


def decoder(path: Path, backend: Any, adapters: Sequence[tuple[Path, float]] = (), n_seq: int = 1) -> Decoder:
    file = GGUFFile.open(path)
    config, arch = ModelConfig.from_metadata(file.metadata, file.tensors), file.metadata["general.architecture"]
    loaded = [(read_adapter(one.stem, GGUFFile.open(one), arch, file.tensors), scale) for one, scale in adapters]
    held = Adapters(loaded, n_seq) if loaded else None
    kinds = [CacheType("f32", "f32")] * config.n_layer
    return Decoder(config, file.tensors, [backend] * config.n_layer, 64, 16, 16, n_seq, kinds, adapters=held)


def logits(made: Decoder, seq: int = 0) -> np.ndarray:
    """Of a prompt in two batches, and of tokens one by one."""
    first = [block.copy() for block in made.forward(IDS[:20], 20, seq)]
    return np.concatenate([*first, *(made.step({seq: [id]}).copy() for id in IDS[20:])])


def backends() -> list[Any]:
    return [NumpyBackend(np.float64), cpu(2)]


@pytest.mark.parametrize("tiny", [LLAMA, TINY_GEMMA3], ids=["llama", "gemma3"])
@pytest.mark.parametrize(("ranks", "type"), [(ALL, "F16"), (UNEVEN, "F32"), (UNEVEN, "BF16")])
def test_logits_are_those_of_merged_weights(tiny: Tiny, ranks: dict[str, int], type: str, tmp_path: Path) -> None:
    pairs, others = random_pairs(tiny, ranks, 1, type), random_pairs(tiny, ALL, 2)
    one = write_adapter(tmp_path / "one.gguf", pairs, tiny.arch, type)
    two = write_adapter(tmp_path / "two.gguf", others, tiny.arch)
    write_tiny(tmp_path / "base.gguf", tiny)
    write_tiny(tmp_path / "merged.gguf", replace(tiny, tensors=merged(tiny, {0.5: pairs, -1.0: others})))
    expected = logits(decoder(tmp_path / "merged.gguf", NumpyBackend(np.float64)))
    base = logits(decoder(tmp_path / "base.gguf", NumpyBackend(np.float64)))
    assert error(base, expected) > 0.05
    for backend in backends():
        assert error(logits(decoder(tmp_path / "base.gguf", backend, [(one, 0.5), (two, -1.0)])), expected) < 1e-5
