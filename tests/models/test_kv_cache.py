"""The cache as an object: several sequences, going back, copies, shifts, bytes out and in; in NumPy and on the CPU."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_ops import cpu, error
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_backend import NumpyBackend
from tinymodel import TINY_GEMMA3, Tiny, write_tiny

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder
from gguf_run.models.kv_cache import GROUP
from gguf_run.models.kv_moves import copy_prefix, export, restore, shift

LLAMA, GEMMA = Tiny(n_ctx=512), replace(TINY_GEMMA3, n_ctx=512, window=40)
IDS = [(7 * i * i + 3 * i + 1) % 270 for i in range(400)]
# Backend, and how near it comes to float64 in whole models.
BACKENDS = {"numpy": (lambda: NumpyBackend(np.float64), 1e-9), "cpu": (lambda: cpu(2), 3e-5)}
Build = Callable[..., Decoder]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder: Path = tmp_path_factory.mktemp("models")

    def build(
        tiny: Tiny, backend: Any, n_ctx: int = 400, n_batch: int = 32, cache: str = "f32", **options: Any
    ) -> Decoder:
        path = folder / f"{tiny.arch}{tiny.n_layer}.gguf"
        if not path.exists():
            write_tiny(path, tiny)
        file = GGUFFile.open(path)
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
        kinds, backends = [CacheType(cache, cache)] * config.n_layer, [backend] * config.n_layer
        return Decoder(config, file.tensors, backends, n_ctx, n_batch, cache_types=kinds, **options)

    return build


def last(decoder: Decoder, ids: Sequence[int], seq: int = 0) -> np.ndarray:
    """Logits after the last of ids, float64[n_vocab]."""
    (logits,) = (block[-1].astype(np.float64) for block in decoder.forward(ids, 1, seq))
    return logits


def fresh(build: Build, tiny: Tiny, ids: Sequence[int]) -> np.ndarray:
    return last(build(tiny, NumpyBackend(np.float64)), ids)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("tiny", [LLAMA, GEMMA], ids=["llama", "gemma3"])
def test_sequences_in_one_step_are_as_each_alone(tiny: Tiny, name: str, build: Build) -> None:
    make, bound = BACKENDS[name]
    decoder = build(tiny, make(), n_seq=4)
    texts = {0: IDS[:100], 1: IDS[50:53], 2: [], 3: IDS[7:60]}
    for seq, ids in texts.items():
        for _ in decoder.forward(ids, 0, seq):
            raise AssertionError
    for step in ({0: [5], 3: [6], 1: [7]}, {2: [9, 8, 7], 0: [1]}, {seq: [10 + seq] for seq in (3, 2, 1, 0)}):
        rows = decoder.step(step).copy()
        for row, (seq, ids) in zip(rows, step.items(), strict=True):
            texts[seq] = [*texts[seq], *ids]
            assert error(row, fresh(build, tiny, texts[seq])) < bound
    assert [decoder.cache.n_past(seq) for seq in range(4)] == [len(ids) for ids in texts.values()]


def test_a_step_that_cannot_be_changes_nothing(build: Build) -> None:
    decoder = build(LLAMA, NumpyBackend(np.float64), n_ctx=8, n_seq=2)
    decoder.step({1: [1] * 8})
    for step, words in (
        ({0: [1], 2: [1]}, "sequence 2 does not exist: the cache has 2"),
        ({0: [1], 1: [1]}, "is full"),
    ):
        with pytest.raises(GgufRunError, match=words) as caught:
            decoder.step(step)
        assert "\n" not in str(caught.value)
    for wrong in ({}, {0: []}, {0: [1] * 5, 1: [1] * 40}):
        with pytest.raises((ValueError, GgufRunError)):
            decoder.step(wrong)
    assert (decoder.cache.n_past(0), decoder.cache.n_past(1)) == (0, 8)


def test_a_window_can_go_back_by_a_batch_and_says_when_it_cannot(build: Build) -> None:
    decoder = build(GEMMA, cpu(2))
    last(decoder, IDS[:300])
    for n_past in (299, 280, 268):  # 300 less a batch
        assert decoder.rewind(n_past) == n_past
        assert error(last(decoder, IDS[n_past:300]), fresh(build, GEMMA, IDS[:300])) < 3e-5
    assert decoder.rewind(100) == 0
    assert decoder.n_past == 0
    last(decoder, IDS[:50])
    assert decoder.rewind(3) == 3  # it has not gone round since
    assert error(last(decoder, IDS[3:90]), fresh(build, GEMMA, IDS[:90])) < 3e-5


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("tiny", [LLAMA, GEMMA], ids=["llama", "gemma3"])
def test_a_prefix_is_copied(tiny: Tiny, name: str, build: Build) -> None:
    make, bound = BACKENDS[name]
    decoder = build(tiny, make(), n_seq=3)
    last(decoder, IDS[:300], 1)
    last(decoder, [9] * 70, 2)
    for n in (300, 277):
        assert copy_prefix(decoder.cache, 1, 2, n) == n
        assert error(last(decoder, [1, 2, 3], 2), fresh(build, tiny, [*IDS[:n], 1, 2, 3])) < bound
    assert copy_prefix(decoder.cache, 1, 0, 60) == decoder.cache.n_past(0) == 60
    assert error(last(decoder, [4], 0), fresh(build, tiny, [*IDS[:60], 4])) < bound
    assert error(last(decoder, [4], 1), fresh(build, tiny, [*IDS[:300], 4])) < bound
    for wrong in ((1, 1, 5), (1, 0, 302), (1, 0, -1)):
        with pytest.raises(ValueError, match="cannot copy"):
            copy_prefix(decoder.cache, *wrong)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("tiny", [LLAMA, GEMMA], ids=["llama", "gemma3"])
def test_a_shift_of_one_layer_is_as_if_the_tokens_had_never_been(tiny: Tiny, name: str, build: Build) -> None:
    """In the first layer keys and values depend on nothing but their token and position."""
    make, bound = BACKENDS[name]
    tiny = replace(tiny, n_layer=1)
    decoder = build(tiny, make(), n_seq=2)
    ids = IDS[:390]
    last(decoder, ids, 1)
    for n_keep, n_discard in ((32, 64), (0, 160), (64, 32)):
        assert shift(decoder.cache, n_keep, n_discard, 1) == len(ids) - n_discard
        ids = [*ids[:n_keep], *ids[n_keep + n_discard :]]
        for new in ([3], [1, 2, 3, 4]):
            ids += new
            assert error(last(decoder, new, 1), fresh(build, tiny, ids)) < bound, (n_keep, n_discard)
    assert decoder.rewind(len(ids) - 20, 1) == len(ids) - 20
    assert error(last(decoder, [8], 1), fresh(build, tiny, [*ids[:-20], 8])) < bound


def test_a_shift_of_many_layers_turns_keys_only(build: Build) -> None:
    """The twin's shift moves rows of exact numbers: the CPU backend's rings and panels must come to the same."""
    for tiny in (LLAMA, GEMMA):
        results = []
        for backend in (NumpyBackend(np.float64), cpu(2)):
            decoder = build(tiny, backend)
            last(decoder, IDS[:333])
            shift(decoder.cache, 32, 128)
            results.append(last(decoder, [1, 2, 3]))
        assert error(results[1], results[0]) < 3e-5


@pytest.mark.parametrize(("name", "bound"), [("f16", 1e-3), ("q8_0", 2e-2), ("int4", 0.3)])
def test_keys_of_any_type_are_turned(name: str, bound: float, build: Build) -> None:
    """They are rounded once more. int4's go through a Hadamard transform, out of it to be turned, and back."""
    tiny = replace(LLAMA, n_layer=1)
    decoder = build(tiny, cpu(2), cache=name)
    last(decoder, IDS[:300])
    shift(decoder.cache, 32, 128)
    ids = [*IDS[:32], *IDS[160:300], 3]
    expected = fresh(build, tiny, ids)
    plain = error(last(build(tiny, cpu(2), cache=name), ids), expected)
    assert error(last(decoder, [3]), expected) < min(bound, 3 * plain)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["run", "rewind", "shift", "copy"]), st.integers(0, 1 << 16)), max_size=12))
def test_any_order_of_operations(build: Build, steps: list[tuple[str, int]]) -> None:
    """One layer, so that recomputing is an oracle of everything."""
    tiny = replace(GEMMA, n_layer=1)
    decoder, texts = build(tiny, cpu(2), n_seq=2), [list(IDS[:150]), [1]]
    for seq in (0, 1):
        last(decoder, texts[seq], seq)
    for what, number in steps:
        seq, amount = number % 2, number // 2
        text, n_past = texts[seq], len(texts[seq])
        if what == "run":
            new = [(amount * i) % 270 for i in range(1, 2 + amount % 60)][: 399 - n_past]
            text += new
            last(decoder, new, seq) if new else None
        elif what == "rewind":
            del text[decoder.rewind(n_past - amount % (min(n_past, 79) + 1), seq) :]
        elif what == "shift" and n_past >= 2 * GROUP:
            n_discard = GROUP * (1 + amount % (n_past // GROUP - 1))
            n_keep = amount % (n_past - n_discard + 1) // GROUP * GROUP
            del text[n_keep : n_keep + n_discard]
            del text[shift(decoder.cache, n_keep, n_discard, seq) :]
        elif what == "copy":
            texts[1 - seq] = text[: copy_prefix(decoder.cache, seq, 1 - seq, amount % (n_past + 1))]
    for seq, text in enumerate(texts):
        assert decoder.cache.n_past(seq) == len(text)
        assert error(last(decoder, [5], seq), fresh(build, tiny, [*text, 5])) < 3e-5


def parts_of(decoder: Decoder, seq: int = 0) -> list[tuple[int, str, bytes]]:
    return [(il, kind, bytes(data)) for il, kind, data in export(decoder.cache, seq)]


@pytest.mark.parametrize("n_past", [1, 31, 64, 300])
@pytest.mark.parametrize("tiny", [LLAMA, GEMMA], ids=["llama", "gemma3"])
def test_bytes_go_out_and_in(tiny: Tiny, n_past: int, build: Build) -> None:
    """Also into a context of another size, with rings of another size."""
    source = build(tiny, cpu(2), n_seq=2, cache="f16")
    last(source, IDS[:n_past], 1)
    parts = parts_of(source, 1)
    n_rows = sum(len(data) for _, kind, data in parts if kind == "k")
    assert n_rows <= 2 * tiny.n_layer * tiny.n_head_kv * tiny.head_dim * (n_past + GROUP)
    targets = [build(tiny, cpu(2), n_ctx=512, n_batch=n, cache="f16") for n in (32, 100, 7)]
    expected = last(source, [1, 2, 3], 1)
    for target in targets:
        last(target, [7] * 200)
        restore(target.cache, n_past, parts)
        assert target.n_past == n_past
        logits = last(target, [1, 2, 3])
        if tiny is LLAMA:
            np.testing.assert_array_equal(logits, expected)
        assert error(logits, expected) < 1e-6  # hidden positions of a window


def test_bytes_that_do_not_fit(build: Build) -> None:
    source, target = build(LLAMA, cpu(2), cache="f16"), build(LLAMA, cpu(2), cache="f16")
    last(source, IDS[:100])
    parts = parts_of(source)
    short = [(il, kind, data[: len(data) // 2]) for il, kind, data in parts]
    for wrong in (parts[1:], [*parts, parts[0]], [(9, "k", b"")], [(0, "x", b"")], short, [(0, "k", b"1")], []):
        last(target, [1])
        with pytest.raises(GgufRunError, match="the saved cache does not fit this model"):
            restore(target.cache, 100, wrong)
        assert target.n_past == 0
    with pytest.raises(GgufRunError, match="does not fit"):
        restore(target.cache, 401, parts)


def test_wrong_shifts(build: Build) -> None:
    decoder = build(LLAMA, NumpyBackend(np.float64))
    last(decoder, IDS[:100])
    for n_keep, n_discard in ((1, 32), (32, 1), (0, 0), (0, 128), (64, 64), (-32, 32)):
        with pytest.raises(ValueError, match="cannot take"):
            shift(decoder.cache, n_keep, n_discard)
    assert decoder.n_past == 100
