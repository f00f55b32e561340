"""Perplexity of the real models on WikiText-2, by llama.cpp's protocol, against bounds set by llama.cpp's figures.

First 4 chunks of 512 tokens, llama.cpp v0.5.0 / transformers in f32: SmolLM2 22.8855 / 22.7437, Gemma 3 15.2256 / -.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from engine import Ours
from numpy.typing import NDArray
from perplexity import negative_log_likelihood, perplexity
from real import gemma3, smollm2, wiki_text


@pytest.mark.parametrize(
    ("model", "n_tokens", "low", "high"), [(smollm2, 303_415, 22.70, 22.95), (gemma3, 295_216, 15.10, 15.60)]
)
def test_perplexity_of_real_model(model: Callable[[], Path], n_tokens: int, low: float, high: float) -> None:
    text = wiki_text()
    with closing(Ours(model(), n_threads=2, n_ctx=512)) as engine:
        ids = engine.tokenize(text)
        assert len(ids) == n_tokens
        *_, last = perplexity(engine, ids, n_ctx=512, n_chunk=4)
    assert low < last < high


def test_negative_log_likelihood_survives_large_logits() -> None:
    logits = np.array([[1000.0, 999.0], [-1000.0, -1000.0]], np.float32)
    assert negative_log_likelihood(logits, [1, 0]) == pytest.approx(1 + np.log1p(np.exp(-1)) + np.log(2))


class Remembering:
    """Predicts the token after the next one correctly, with odds 3 : 1 : 1 : 1; yields rows in blocks of 2."""

    cpu, weight_bytes, n_vocab = "", 0, 4

    def __init__(self, bos: int | None) -> None:
        self.bos = bos
        self.seen: list[list[int]] = []

    def rewind(self, n_past: int) -> int:
        assert n_past == 0
        self.seen.append([])
        return 0

    def forward(self, ids: Sequence[int], n_outputs: int = 1) -> Iterator[NDArray[np.float32]]:
        self.seen[-1] += ids
        logits = np.log(1.0 + 2.0 * np.eye(4, dtype=np.float32)[[*ids[1:], 0]])[len(ids) - n_outputs :]
        yield from (logits[start : start + 2] for start in range(0, n_outputs, 2))

    def tokenize(self, text: str) -> list[int]:
        raise NotImplementedError

    def rest(self) -> None:
        pass


@pytest.mark.parametrize("bos", [None, 3])
def test_protocol(bos: int | None) -> None:
    """Right token, right row: a perplexity of exactly 2; BOS stands in for each chunk's first token."""
    engine = Remembering(bos)
    ids = [2, 1, 0, 1, 2, 0, 0, 1, 1, 2, 0, 1, 2, 2, 1, 0, 0]
    assert list(perplexity(engine, ids, n_ctx=8, n_chunk=2)) == pytest.approx([2.0, 2.0])
    starts = [ids[0], ids[8]] if bos is None else [bos, bos]
    assert engine.seen == [[starts[0], *ids[1:8]], [starts[1], *ids[9:16]]]
