"""Model.embed and Model.rank, on small random models."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tinymodel import QKV, Tiny, write_tiny

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime import Model
from gguf_run.runtime.engine.check import ContextError
from gguf_run.runtime.info.edit import edit

TEXTS = ["the order", "the order of another one and the other", "a"]
HEAD = {"cls.output.weight": np.random.default_rng(3).standard_normal((2, 96)).astype(np.float32)}
PROMPT = "<|im_start|>q: {query}\nd: {document}<|im_end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("tiny")
    write_tiny(folder / "text.gguf", Tiny(arch="qwen2", biases=QKV))
    write_tiny(folder / "first.gguf", Tiny(arch="qwen2", biases=QKV, metadata={"pooling_type": 4}, tensors=HEAD))
    with GGUFFile.open(folder / "first.gguf") as file:
        edit(file, [f"tokenizer.chat_template.rerank={PROMPT}"], [], folder / "rank.gguf", lambda done, total: None)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with Model.load(folder / "text.gguf", device="cpu", n_ctx=64, embed=True) as model:
        yield model


def test_rows_are_those_of_each_text(model: Model) -> None:
    rows = model.embed(TEXTS)
    assert rows.dtype == np.float32
    assert rows.shape == (3, 96)
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=1e-6)
    for pooling in (None, "last", "mean", "cls"):
        raw = model.embed(TEXTS, pooling, normalize=False)
        assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 0.1
        for i, text in enumerate(TEXTS):
            assert (model.embed([model.tokenize(text)], pooling, normalize=False)[0] == raw[i]).all()
    assert (model.embed(TEXTS) == model.embed(TEXTS, "last")).all()  # the file names no pooling
    assert np.abs(model.embed(TEXTS) - model.embed(TEXTS, "mean")).max() > 1e-3


def test_what_embed_refuses(model: Model, folder: Path) -> None:
    for call, words in (
        (
            lambda: model.embed(TEXTS, "lest"),
            r"pooling \(--pooling\) is 'lest'; did you mean last\? allowed: mean, cls",
        ),
        (lambda: model.embed("the"), "texts is 'the'; allowed: a list of at least one text"),
        (lambda: model.embed([]), r"texts is \[\]; allowed: a list"),
        (lambda: model.rank("the", TEXTS), "this model cannot rank: load a reranker"),
    ):
        with pytest.raises(OptionError, match=words):
            call()
    with pytest.raises(ContextError, match=r"text 1 has .* tokens, the context holds 64"):
        model.embed(["a", "the order " * 50])
    with pytest.raises(GgufRunError, match="text 0 is empty"):
        model.embed([""])
    with pytest.raises(GgufRunError, match="has the id 99999"):
        model.embed([[99999]])
    for call in (lambda: [*model.generate("the")], lambda: model.logits([1, 2]), lambda: model.generate_batch(["the"])):
        with pytest.raises(GgufRunError, match="a model for text without embed=True"):
            call()
    with (
        Model.load(folder / "text.gguf", device="cpu") as other,
        pytest.raises(OptionError, match="this model was loaded to make text: load it with embed=True"),
    ):
        other.embed(TEXTS)
    other.close()
    with pytest.raises(GgufRunError, match="the model is closed"):
        other.embed(TEXTS)


def test_rank(folder: Path) -> None:
    """A document that names a placeholder does not get the query."""
    texts = [*TEXTS, "{query}"]
    with Model.load(folder / "rank.gguf", device="cpu", n_ctx=128) as model:
        found = model.rank("the other", texts)
        prompts = [f"<|im_start|>q: the other\nd: {text}<|im_end|>" for text in texts]
        rows = model.embed([model.tokenize(prompt) for prompt in prompts], "last", normalize=False)
    yes, no = rows @ HEAD["cls.output.weight"].T[:, :1], rows @ HEAD["cls.output.weight"].T[:, 1:]
    assert found == pytest.approx((1 / (1 + np.exp(no - yes)))[:, 0], abs=1e-6)
    with (
        Model.load(folder / "first.gguf", device="cpu") as model,
        pytest.raises(OptionError, match=r"and tokenizer.chat_template.rerank"),
    ):
        model.rank("the", TEXTS)
