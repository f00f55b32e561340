"""Files beside their base: the figures are those of two models that run side by side."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from tinymodel import Tiny, write_tiny

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.runtime import Model
from gguf_run.runtime.evaluate.compare_files import check_vocabulary, compared, known_base
from gguf_run.runtime.evaluate.kl import compare
from gguf_run.runtime.evaluate.text import Scorer, bos_of, cut_chunks, tokens_of

TEXTS = ["the order and another one, or the other end of the road and so on. " * 6, "and then there were none " * 12]


@contextmanager
def load(path: Path) -> Iterator[Scorer]:
    with Model.load(path, n_ctx=32, n_threads=2) as model, Scorer(model, 2) as scorer:
        yield scorer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_tiny(folder / "base.gguf")
    write_tiny(folder / "q4.gguf", Tiny(type="Q4_0"))
    write_tiny(folder / "bos.gguf", Tiny(pre="llama-bpe"))
    write_tiny(folder / "spm.gguf", Tiny(vocab="spm"))
    return folder


def test_figures_of_two_models_side_by_side(folder: Path) -> None:
    step = Mock()
    with known_base(load, folder / "base.gguf", TEXTS, step, 3, 32, 1) as known:
        assert step.call_count == 3 * len(TEXTS)
        found = compared(load, folder / "q4.gguf", known, step)
        (same, _) = compared(load, folder / "base.gguf", known, step)
        place = known[0].logits.parent
    assert step.call_count == 3 * 3 * len(TEXTS)
    assert not place.exists()
    assert not same.scores("kl").any()
    with load(folder / "base.gguf") as base, load(folder / "q4.gguf") as q4:
        for text, done in zip(TEXTS, found, strict=True):
            chunks = cut_chunks(tokens_of(base.model, text), 32, bos_of(base.model), 3, n_skip=1)
            *_, expected = compare(q4, lambda i, chunks=chunks: base.run(chunks[i].ids, chunks[i].targets), chunks)  # type: ignore[misc]
            for name in ("nll", "nll_base", "same_top"):
                assert done.scores(name).tolist() == expected.scores(name).tolist()
            assert done.scores("kl") == pytest.approx(expected.scores("kl"), rel=1e-3, abs=1e-7)
            assert np.mean(done.scores("kl")) > 1e-5


def test_files_of_other_tokens(folder: Path) -> None:
    check_vocabulary(folder / "q4.gguf", folder / "base.gguf")
    with pytest.raises(GgufRunError, match=r"spm\.gguf: has another vocabulary than .*base\.gguf"):
        check_vocabulary(folder / "spm.gguf", folder / "base.gguf")
    with (
        known_base(load, folder / "base.gguf", TEXTS, Mock(), 1, 32) as known,
        pytest.raises(GgufRunError, match=r"bos\.gguf: splits the text into other tokens than the base"),
    ):
        compared(load, folder / "bos.gguf", known, Mock())


def test_texts_that_are_too_short(folder: Path) -> None:
    with (
        pytest.raises(GgufRunError, match="one chunk needs 32"),
        known_base(load, folder / "base.gguf", ["the"], Mock(), 3, 32),
    ):
        pass
    with (
        pytest.raises(OptionError, match="--skip is 99"),
        known_base(load, folder / "base.gguf", TEXTS, Mock(), 3, 32, 99),
    ):
        pass
