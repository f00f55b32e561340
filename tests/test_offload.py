"""Models whose layers are on several backends: the hidden state crosses over, all else stays as it was."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_ops import cpu
from tinymodel import AWKWARD_LLAMA, TINY_GEMMA3, Tiny, write_tiny

from gguf_run.formats.reader import GGUFFile
from gguf_run.kernels_cpu.backend import CpuBackend
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder

IDS = [(7 * i * i + 3 * i + 1) % 270 for i in range(60)]
# Which of two backends looks up the embeddings and has each of the six layers.
PLACES = ("aaaabbb", "aabbbbb", "abbbbbb", "abbaaba", "aababab")
MODELS = {"llama": replace(AWKWARD_LLAMA, n_layer=6, type="Q8_0"), "gemma3": replace(TINY_GEMMA3, n_layer=6)}


def logits(decoder: Decoder, ids: Sequence[int], n_outputs: int | None = None, seq: int = 0) -> np.ndarray:
    wanted = len(ids) if n_outputs is None else n_outputs
    return np.concatenate([block.copy() for block in decoder.forward(ids, wanted, seq)])


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Decoder]:
    """Write a model and open it over the backends that the letters of `places` stand for."""

    def build(tiny: Tiny, places: str, backends: dict[str, Any], **options: Any) -> Decoder:
        write_tiny(tmp_path / "tiny.gguf", tiny)
        file = GGUFFile.open(tmp_path / "tiny.gguf")
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
        embedding, *layers = (backends[letter] for letter in places)
        return Decoder(config, file.tensors, layers, 96, embedding=embedding, **options)

    return build


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("name", MODELS)
def test_several_backends_give_the_same_logits(name: str, places: str, build: Callable[..., Decoder]) -> None:
    """To the last bit: in batches with some logits wanted, one by one, after a rewind, in several sequences, after
    shifts and copies of a cache."""
    backends = {"a": cpu(2), "b": cpu(3)}
    options = {"n_batch": 16, "n_outputs": 4, "n_seq": 3}
    one, several = (build(MODELS[name], p, backends, **options) for p in ("aaaaaaa", places))

    def results(decoder: Decoder) -> list[np.ndarray]:
        made = [logits(decoder, IDS[:37], 9), *(logits(decoder, [id]) for id in IDS[37:40])]
        assert decoder.rewind(38) == 38
        made.append(logits(decoder, IDS[38:50]))
        if decoder.cache.copy_prefix(0, 1, 32):
            made.append(logits(decoder, IDS[:5], 2, seq=1))
        made.append(decoder.step({0: IDS[:3], 1: IDS[3:4], 2: IDS[4:9]}).copy())
        parts = [(il, kind, bytes(data)) for il, kind, data in decoder.cache.export()]
        decoder.cache.load(decoder.n_past, parts, seq=2)
        made.append(logits(decoder, IDS[9:13], seq=2))
        decoder.rewind(0)
        logits(decoder, IDS)
        if decoder.cache.shift(0, 32):
            made.append(logits(decoder, IDS[:6], 3))
        return made

    for a, b in zip(results(one), results(several), strict=True):
        assert np.array_equal(a, b)


def test_sizes_are_those_of_all_backends(build: Callable[..., Decoder]) -> None:
    backends = {"a": CpuBackend(1), "b": CpuBackend(1)}
    decoder = build(MODELS["llama"], "aaabbbb", backends)
    a, b = (backend.nbytes() for backend in backends.values())
    assert decoder.nbytes() == {kind: a[kind] + b[kind] for kind in a}
    assert a["cache"] * 2 == b["cache"]
    assert a["weights"] < b["weights"]
    decoder.close()
    for backend in backends.values():
        backend.close()
