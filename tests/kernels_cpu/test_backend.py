"""Whole tiny models on the CPU backend, against NumPy in float64."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_ops import Q8Backend, cpu, error, random_tensor
from numpy_backend import NumpyBackend
from tinymodel import ALL_BIASES, AWKWARD_LLAMA, QKV, TINY_GEMMA3, WIDE_LLAMA, Tiny, tiny_moe, vocabulary, write_tiny

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.kernels_cpu.backend import CpuBackend
from gguf_run.kernels_cpu.vector.isa import Tuning, current
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder

IDS = [(7 * i * i + 3 * i + 1) % 270 for i in range(60)]
FLOAT_MODELS = {
    "llama": Tiny(),
    "awkward llama": AWKWARD_LLAMA,
    "gemma3": TINY_GEMMA3,
    "odd widths": Tiny(n_embd=36, n_head=3, n_head_kv=1, head_dim=10, n_ff=50, biases=QKV),
    "many heads": Tiny(n_layer=1, n_embd=64, n_head=40, n_head_kv=1, head_dim=8, n_ff=40),
}
LEGACY = {"attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q5_0", "ffn_gate": "Q5_1", "ffn_up": "F16", "ffn_down": "BF16"}
K_QUANTS = {"attn_q": "Q2_K", "attn_k": "Q3_K", "attn_v": "Q6_K", "ffn_gate": "Q5_K", "token_embd": "Q6_K"}
QUANTIZED_MODELS = {
    "Q8_0": replace(WIDE_LLAMA, type="Q8_0"),
    "Q4_0": Tiny(type="Q4_0", biases=ALL_BIASES),
    "legacy": Tiny(type="Q8_0", types=LEGACY, tied=False),
    "Q4_K": replace(WIDE_LLAMA, type="Q4_K", types={"token_embd": "Q6_K"}),
    "K-quants": replace(WIDE_LLAMA, type="Q4_K", types=K_QUANTS, biases=QKV),
    "gemma3": replace(TINY_GEMMA3, type="Q8_0", types={"ffn_down": "Q4_1", "attn_v": "F32"}),
}


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Decoder]:
    """Write a model and open it in a decoder over one backend."""

    def build(tiny: Tiny, backend: Any, cache: str = "f16", n_ctx: int = 64, **options: Any) -> Decoder:
        path = tmp_path / f"{abs(hash(str(tiny)))}.gguf"
        if not path.exists():
            write_tiny(path, tiny)
        file = GGUFFile.open(path)
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
        kinds = [CacheType(cache, cache)] * config.n_layer
        return Decoder(config, file.tensors, [backend] * config.n_layer, n_ctx, cache_types=kinds, **options)

    return build


def all_logits(decoder: Decoder, ids: Sequence[int], n_outputs: int | None = None) -> np.ndarray:
    return np.concatenate([block.copy() for block in decoder.forward(ids, n_outputs or len(ids))])


def in_pieces(decoder: Decoder) -> np.ndarray:
    """Logits of all of IDS, given as a batch, single tokens and a batch."""
    parts = [all_logits(decoder, ids) for ids in (IDS[:21], *([id] for id in IDS[21:33]), IDS[33:])]
    return np.concatenate(parts)


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("name", FLOAT_MODELS)
def test_float_models(name: str, type_name: str, build: Callable[..., Decoder]) -> None:
    tiny = replace(FLOAT_MODELS[name], type=type_name)
    expected = all_logits(build(tiny, NumpyBackend(np.float64)), IDS)
    # float32 arithmetic has 24 bits; errors add up over widths of some hundreds and a few layers
    assert error(all_logits(build(tiny, cpu(2), "f32"), IDS), expected) < 2e-5
    assert error(in_pieces(build(tiny, cpu(3), "f32", n_batch=16, n_outputs=5)), expected) < 2e-5
    rounded = in_pieces(build(tiny, NumpyBackend(np.float64, np.float16)))
    # a key or value next to the middle of two halves may be rounded the other way
    assert error(in_pieces(build(tiny, cpu(2))), rounded) < 1e-3


def short_texts(decoder: Decoder) -> np.ndarray:
    """Logits of texts of 4 tokens, as a batch or, every other one, as 3 tokens and one: [n_texts * 4, n_vocab]."""
    parts = []
    for i in range(0, len(IDS), 4):
        decoder.rewind(0)
        steps = [IDS[i : i + 4]] if i % 8 else [IDS[i : i + 3], IDS[i + 3 : i + 4]]
        parts += [all_logits(decoder, ids) for ids in steps]
    return np.concatenate(parts)


@pytest.mark.parametrize("name", QUANTIZED_MODELS)
def test_quantized_models(name: str, build: Callable[..., Decoder]) -> None:
    """The only approximation is that activations are int8 where weights are quantized: it costs 1 to 2 % of the logits.

    An oracle that does the same in float64 agrees to 1e-6, but for the texts in which an activation is so near to the
    middle between two integers that float32 goes the other way: one such step is worth up to 1 % of the logits too.
    """
    tiny = QUANTIZED_MODELS[name]
    exact = short_texts(build(tiny, NumpyBackend(np.float64)))
    oracle = build(tiny, Q8Backend(np.float64))
    expected, actual = short_texts(oracle), short_texts(build(tiny, cpu(2), "f32"))

    def rms(x: np.ndarray) -> Any:
        return np.sqrt((x * x).mean(-1)) / np.sqrt((exact * exact).mean())

    errors = rms(actual - expected)
    assert np.quantile(errors, 0.75) < 1e-6
    assert errors.max() < 0.03
    assert 0.005 < np.median(rms(actual - exact)) < 0.03
    oracle.rewind(0)
    assert rms(in_pieces(build(tiny, cpu(3))) - in_pieces(oracle)).max() < 0.05


@pytest.mark.parametrize("name", ["llama", "odd widths", "legacy", "K-quants", "moe"])
def test_a_sequence_gets_the_same_bits_among_others(name: str, build: Callable[..., Decoder]) -> None:
    """Prompts, single tokens, some at once; in steps of 1 to 33 sequences, over a context that others would split."""
    tiny = tiny_moe(2, "Q8_0") if name == "moe" else (FLOAT_MODELS | QUANTIZED_MODELS)[name]
    tiny = replace(tiny, n_layer=min(2, tiny.n_layer), n_ctx=600)
    results = []
    for n_others in (0, 1, 4, 9, 32):
        backend, rng = CpuBackend(2, deterministic=True), np.random.default_rng(n_others)
        decoder, found = build(tiny, backend, n_ctx=600, n_seq=33, n_batch=600, n_cells=10_000), []
        for chunk in (300, 200, 1, 1, 1):
            ids = [(7 * i * i + chunk) % 270 for i in range(chunk)]
            others = {seq: rng.integers(0, 270, rng.integers(1, 6)).tolist() for seq in range(1, 1 + n_others)}
            found.append(decoder.step(others | {0: ids})[-1].copy())
        assert decoder.rewind(500) == 500
        together = decoder.step({0: [1] * 3}, {0: 3})
        np.testing.assert_array_equal(together, found[2:])
        results.append(np.stack(found))
        backend.close()
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_sizes_are_reported(build: Callable[..., Decoder]) -> None:
    """A panel of 16 rows for 16 rows of the file, half floats in the cache."""
    backend = CpuBackend(2)
    build(replace(WIDE_LLAMA, type="Q4_0", types={"token_embd": "Q4_0"}, n_layer=1), backend)
    n_embd, n_kv, n_ff = 256, 128, 512
    weights = n_embd * (2 * n_embd + 2 * n_kv + 3 * n_ff) // 32 * 18
    output = -(-len(vocabulary(WIDE_LLAMA)["tokens"]) // 16) * 16 * n_embd // 32 * 18
    assert backend.nbytes()["weights"] == weights + output
    assert backend.nbytes()["cache"] == 2 * 2 * n_kv * 64
    backend.close()


def test_name_says_what_runs() -> None:
    for n_threads, words in ((1, "1 thread,"), (3, "3 threads,")):
        assert cpu(n_threads).name == f"CPU, {words} {current().name}"


def test_closed_backend_leaves_no_threads() -> None:
    before = set(threading.enumerate())
    backend = CpuBackend(4)
    backend.weight([random_tensor("F32", 64, 64)])
    backend.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert set(threading.enumerate()) <= before


def test_numbers_of_the_machine_reach_all_programs(tmp_path: Path) -> None:
    """Programs that are there, and those that come."""
    write_tiny(tmp_path / "tiny.gguf")
    backend = CpuBackend(1)
    with GGUFFile.open(tmp_path / "tiny.gguf") as file:
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
        decoders = []
        for tuning in (Tuning(ahead=-1), Tuning(ahead=0, piece_bytes=65536)):
            decoders.append(Decoder(config, file.tensors, [backend] * config.n_layer, n_ctx=8))
            backend.tune(tuning)
        decoders.append(Decoder(config, file.tensors, [backend] * config.n_layer, n_ctx=8))
    records = [a for tape in backend._tapes for a in tape._arguments if "ahead" in (a.dtype.names or ())]
    assert len(backend._tapes) >= 3
    assert len(records) > 3 * config.n_layer
    assert {(int(a["ahead"][0]), int(a["piece_bytes"][0])) for a in records} == {(0, 65536)}
    backend.close()
