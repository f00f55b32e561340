"""The protocol of gguf-eval perplexity: which tokens are scored on which, and the figures that come of it."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from plain_model import reference
from real import gemma3, shared_data, smollm2
from tinymodel import TINY_GEMMA3, Tiny, write_tiny

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.runtime import Model
from gguf_run.runtime.cli.evaluate import main
from gguf_run.runtime.evaluate.perplexity import Perplexity, perplexity
from gguf_run.runtime.evaluate.text import (
    Block,
    Chunk,
    Scorer,
    bos_of,
    check_finite,
    cut_chunks,
    tokens_of,
    window_size,
)

BOS = 99


# Chunks.


def test_chunks_score_their_second_half() -> None:
    chunks = cut_chunks(range(21), n_ctx=8, bos=None)
    assert chunks == [
        Chunk([0, 1, 2, 3, 4, 5, 6], [5, 6, 7]),
        Chunk([8, 9, 10, 11, 12, 13, 14], [13, 14, 15]),
    ]


def test_bos_takes_the_place_of_the_first_token() -> None:
    chunks = cut_chunks([BOS, *range(1, 16)], n_ctx=8, bos=BOS)
    assert [chunk.ids[:2] for chunk in chunks] == [[BOS, 1], [BOS, 9]]
    assert chunks[1].targets == [13, 14, 15]


def test_odd_chunks() -> None:
    """Position n_ctx // 2 is the first whose prediction counts."""
    assert cut_chunks(range(5), n_ctx=5, bos=None) == [Chunk([0, 1, 2, 3], [3, 4])]


@pytest.mark.parametrize(("n_token", "n_chunk"), [(8, 1), (15, 1), (16, 2), (17, 2)])
def test_number_of_chunks(n_token: int, n_chunk: int) -> None:
    assert len(cut_chunks(range(n_token), 8, None)) == n_chunk
    assert len(cut_chunks(range(n_token), 8, None, n_chunk=1)) == 1
    assert len(cut_chunks(range(n_token), 8, None, n_chunk=9)) == n_chunk


def test_stride() -> None:
    """Windows of 8 + 4/2 tokens, 4 apart; as in llama.cpp, the last one that fits exactly is left out."""
    chunks = cut_chunks(range(18), n_ctx=8, bos=BOS, stride=4)
    assert chunks == [
        Chunk([BOS, 1, 2, 3, 4, 5, 6, 7, 8], [6, 7, 8, 9]),
        Chunk([BOS, 5, 6, 7, 8, 9, 10, 11, 12], [10, 11, 12, 13]),
    ]
    assert len(cut_chunks(range(19), n_ctx=8, bos=None, stride=4)) == 2 + 1
    assert window_size(8, 4) == 10


@pytest.mark.parametrize(
    ("n_token", "options", "message"),
    [
        (7, {}, r"the text has 7 tokens, one chunk needs 8"),
        (10, {"stride": 4}, r"the text has 10 tokens, one chunk needs 11"),
        (0, {}, r"the text has 0 tokens"),
    ],
)
def test_short_text(n_token: int, options: dict[str, int], message: str) -> None:
    with pytest.raises(GgufRunError, match=message):
        cut_chunks(range(n_token), 8, None, **options)


@pytest.mark.parametrize(
    ("n_ctx", "options", "message"),
    [
        (3, {}, "--ctx-size is 3; allowed: at least 4"),
        (-1, {}, "--ctx-size is -1"),
        (8, {"stride": 0}, "--stride is 0; allowed: 1 to the context size, 8"),
        (8, {"stride": 9}, "--stride is 9"),
        (8, {"n_chunk": 0}, "--chunks is 0; allowed: at least 1"),
        (8, {"n_skip": 12}, "--skip is 12; the text has 12 chunks, allowed: 0 to 11"),
    ],
)
def test_sizes_that_are_not_allowed(n_ctx: int, options: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        cut_chunks(range(100), n_ctx, None, **options)


# Scores.

ARCHITECTURES = {"llama": (Tiny(), 1e4), "gemma3": (TINY_GEMMA3, 1e6)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_against_a_plain_model(tmp_path: Path, name: str) -> None:
    """-log p of each target, in float64 from the weights; and the perplexity that comes of it."""
    tiny, base = ARCHITECTURES[name]
    weights = write_tiny(tmp_path / "tiny.gguf", tiny)
    inv_freq = base ** -(np.arange(tiny.head_dim // 2) / (tiny.head_dim // 2))
    with (
        Model.load(tmp_path / "tiny.gguf", n_threads=2, n_ctx=24, cache_type="f32") as model,
        Scorer(model, 2) as scorer,
    ):
        ids = tokens_of(model, "the order and another one, or the other end of the road and so on " * 2)
        chunks = cut_chunks(ids, 24, bos_of(model))
        assert len(chunks) > 1
        expected = []
        for chunk in chunks:
            logits = reference(tiny, weights, chunk.ids, inv_freq)[-len(chunk.targets) :]
            expected.append(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), chunk.targets])
            found = np.concatenate([block.nll for block in scorer.run(chunk.ids, chunk.targets)])
            assert found == pytest.approx(expected[-1], abs=1e-4)
        *_, last = perplexity(scorer, chunks)
    every = np.concatenate(expected)
    assert (last.n_chunk, last.n_scored) == (len(chunks), len(every))
    assert last.value == pytest.approx(np.exp(every.mean()), rel=1e-5)
    assert last.error == pytest.approx(last.value * every.std(ddof=1) / math.sqrt(len(every)), rel=1e-4)


def test_more_scores_than_logits_are_held_at_once(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf")
    with Model.load(tmp_path / "tiny.gguf", n_threads=2, n_ctx=128) as model, Scorer(model, 2) as scorer:
        ids = np.random.default_rng(0).integers(3, 250, 129).tolist()
        blocks = [block.nll for block in scorer.run(ids[:128], ids[29:])]
        assert len(blocks) > 1
        logits = model.logits(ids[:128])[28:].astype(np.float64)
        expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(100), ids[29:]]
        assert np.concatenate(blocks) == pytest.approx(expected, abs=1e-5)


def test_text_ids_have_bos_but_no_eos(tmp_path: Path) -> None:
    """And names of control tokens are plain text."""
    write_tiny(tmp_path / "tiny.gguf", Tiny(vocab="spm"))
    with Model.load(tmp_path / "tiny.gguf", n_ctx=8) as model:
        plain = model.tokenizer.encode("a</s>", add_special=False, parse_special=False)
        assert (tokens_of(model, "a</s>"), bos_of(model)) == ([1, *plain], 1)
        assert model.tokenizer.eos not in plain
        model.tokenizer.add_eos, model.tokenizer.add_bos = True, False
        assert (tokens_of(model, "a</s>"), bos_of(model)) == (plain, None)


class Remembering:
    """In place of a Scorer: gives out these scores, in blocks of 2."""

    def __init__(self, nll: Sequence[float]) -> None:
        self.nll = np.array(nll)

    def run(self, ids: Sequence[int], targets: Sequence[int]) -> Iterator[Block]:
        for start in range(0, len(targets), 2):
            at = targets[start : start + 2]
            yield Block(np.zeros((len(at), 1), np.float32), self.nll[at])


def test_perplexity_over_all_chunks_so_far() -> None:
    nll = [1.0, 2.0, 4.0, 0.5, 0.25]
    seen: list[NDArray[np.float64]] = []
    chunks = [Chunk([], [0, 1, 2]), Chunk([], [3, 4])]
    first, second = perplexity(Remembering(nll), chunks, lambda block: seen.append(block.nll))  # type: ignore[arg-type]
    assert first.value == pytest.approx(math.exp(7 / 3))
    assert second.value == pytest.approx(math.exp(7.75 / 5))
    assert second.error == pytest.approx(second.value * np.std(nll, ddof=1) / math.sqrt(5))
    assert [len(part) for part in seen] == [2, 1, 2]


def test_error_of_a_single_value_is_unknown() -> None:
    assert math.isnan(Perplexity(1, 1, 2.0, 4.0).error)


def test_a_broken_model_is_an_error() -> None:
    with pytest.raises(GgufRunError, match=r"chunk 1: the model's logits are not finite"):
        list(perplexity(Remembering([1.0, math.nan]), [Chunk([], [0, 1])]))  # type: ignore[arg-type]
    check_finite(np.zeros(3), "nothing")


# The real thing, by llama.cpp's figures for 4 chunks (notes: SmolLM2 22.8855, transformers 22.7437; Gemma 3 15.2256).


@pytest.mark.parametrize(("model", "low", "high"), [(smollm2, 22.70, 22.95), (gemma3, 15.10, 15.60)])
def test_perplexity_of_real_model(model: Callable[[], Path], low: float, high: float) -> None:
    text = shared_data("wiki.test.raw")
    result = CliRunner().invoke(main, ["perplexity", str(model()), "-f", str(text), "--chunks", "4", "--json"])
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)
    assert low < figures["perplexity"] < high
    assert figures["perplexity"] == figures["running"][3]
    assert 0.08 < figures["perplexity_error"] / figures["perplexity"] < 0.12
