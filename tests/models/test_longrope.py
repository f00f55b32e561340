"""LongRoPE: the length of a sequence, not that of the context, chooses its factors, on every way to that length."""

from collections.abc import Callable, Sequence
from typing import Any

import hf_tiny
import numpy as np
import pytest
from numpy.typing import NDArray
from numpy_backend import NumpyBackend
from texts import engine_over, prefill

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.kernels_cpu.backend import CpuBackend
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder
from gguf_run.models.kv_moves import copy_prefix, export, restore
from gguf_run.models.protocol import AnyBackend
from gguf_run.runtime.convert.open_checkpoint import open_checkpoint

pytest.importorskip("torch")
pytest.importorskip("transformers")

N_SHORT = 32
IDS = [(7 * i * i + 3 * i + 2) % hf_tiny.N_VOCAB for i in range(90)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[GGUFFile, Any]:
    """A model with short factors up to 32 tokens, and transformers' model."""
    folder = tmp_path_factory.mktemp("longrope")
    rope = {**hf_tiny._LONGROPE, "original_max_position_embeddings": N_SHORT}
    sizes = {"max_position_embeddings": 256, "original_max_position_embeddings": N_SHORT}
    model = hf_tiny.make("phi3-longrope", folder, rope_parameters=rope, **sizes)
    return open_checkpoint(folder), model


@pytest.fixture(params=["numpy", "cpu"])
def make(request: pytest.FixtureRequest, tiny: tuple[GGUFFile, Any]) -> Callable[..., Decoder]:
    file, _ = tiny
    config = ModelConfig.from_metadata(file.metadata, file.tensors)

    def made(n_ctx: int = 128, **options: Any) -> Decoder:
        backend: AnyBackend = CpuBackend(1) if request.param == "cpu" else NumpyBackend(np.float64)
        kinds = [CacheType("f32", "f32")] * config.n_layer
        return Decoder(config, file.tensors, [backend] * config.n_layer, n_ctx, cache_types=kinds, **options)

    return made


def assert_close(logits: Sequence[NDArray[np.float32]] | NDArray[np.float32], model: Any, ids: Sequence[int]) -> None:
    """Compare the last rows with transformers' logits."""
    found = np.atleast_2d(np.asarray(logits))
    expected = hf_tiny.logits(model, ids)[-len(found) :]
    assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < 1e-5


def run(decoder: Decoder, ids: Sequence[int], seq: int = 0) -> NDArray[np.float32]:
    return np.concatenate([block.copy() for block in decoder.forward(ids, len(ids), seq)])


@pytest.mark.parametrize("n", [16, N_SHORT, N_SHORT + 1, 60])
def test_a_prompt(n: int, make: Callable[..., Decoder], tiny: tuple[GGUFFile, Any]) -> None:
    assert_close(run(make(n_batch=20), IDS[:n]), tiny[1], IDS[:n])


def test_a_sequence_grows_and_is_cut(make: Callable[..., Decoder], tiny: tuple[GGUFFile, Any]) -> None:
    decoder, (_, model) = make(n_batch=20), tiny
    run(decoder, IDS[:30])
    for n in range(31, 36):
        assert_close(decoder.step({0: IDS[n - 1 : n]}), model, IDS[:n])
    assert decoder.n_past == 35
    assert decoder.rewind(33) == 33
    assert_close(run(decoder, IDS[50:55]), model, IDS[:33] + IDS[50:55])
    assert decoder.rewind(10) == 0  # keys of a long sequence are of no use to a short one
    assert_close(run(decoder, IDS[:20]), model, IDS[:20])
    assert decoder.rewind(10) == 10
    assert_close(run(decoder, IDS[40:80]), model, IDS[:10] + IDS[40:80])


def test_sequences_of_both_kinds_in_one_step(make: Callable[..., Decoder], tiny: tuple[GGUFFile, Any]) -> None:
    decoder, (_, model) = make(n_batch=64, n_seq=3), tiny
    run(decoder, IDS[:31], 0)
    run(decoder, IDS[10:60], 1)
    assert copy_prefix(decoder.cache, 0, 2, 20) == 20
    texts = {0: IDS[:31], 1: IDS[10:60], 2: IDS[:20]}
    for i in range(60, 64):
        rows = decoder.step({seq: [IDS[i]] for seq in texts}).copy()
        texts = {seq: [*ids, IDS[i]] for seq, ids in texts.items()}
        for row, ids in zip(rows, texts.values(), strict=True):
            assert_close(row, model, ids)


def test_the_engine(make: Callable[..., Decoder], tiny: tuple[GGUFFile, Any]) -> None:
    """A conversation that grows, is sent again from its beginning, is saved and restored, and drops its middle."""
    decoder, (_, model) = make(n_ctx=96), tiny
    engine = engine_over(decoder)
    for n in (20, 40, 25, 60):
        assert_close(prefill(engine, IDS[:n])[0], model, IDS[:n])
    prefill(engine, IDS[:30])
    parts = [(il, kind, bytes(data)) for il, kind, data in export(decoder.cache)]
    restore(decoder.cache, 30, parts, ids=IDS[:30])
    assert_close(prefill(engine, IDS[:50])[0], model, IDS[:50])
    text = list(IDS[:90])
    prefill(engine, text, n_keep=32)
    for id in IDS[:30]:  # the context of 96 is full after six
        text.append(id)
        assert prefill(engine, text, n_keep=32)[1] == len(text) - 1
    assert 32 < decoder.n_past < 96


def test_a_sequence_that_was_loaded_without_ids(make: Callable[..., Decoder]) -> None:
    decoder = make()
    run(decoder, IDS[:30])
    parts = [(il, kind, bytes(data)) for il, kind, data in export(decoder.cache)]
    restore(decoder.cache, 30, parts)
    with pytest.raises(GgufRunError, match="loaded without its ids"):
        run(decoder, IDS[:10])
