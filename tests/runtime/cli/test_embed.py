"""gguf-run --embed: one JSON list for a text, one for each line of a file."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tinymodel import Tiny, write_tiny

from gguf_run.runtime import Model
from gguf_run.runtime.cli.run import main


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny(path, Tiny())
    return path


def run(*arguments: str | Path, input: str | None = None) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), "--device", "cpu"], input=input)


def test_texts_and_lines(path: Path, tmp_path: Path) -> None:
    texts = ["the order", "another one"]
    (tmp_path / "lines.txt").write_text(f"{texts[0]}\n\n{texts[1]}\n")
    with Model.load(path, device="cpu", embed=True) as model:
        rows, means = model.embed(texts), model.embed(texts, "mean")
    for expected, done in (
        (rows[:1], run(path, "--embed", "-p", texts[0])),
        (rows[1:], run(path, texts[1], "--embed")),
        (means, run(path, "--embed", "--pooling", "mean", "--file", tmp_path / "lines.txt")),
        (rows, run(path, "--embed", input="\n".join(texts))),
    ):
        assert done.exit_code == 0, done.output
        found = [json.loads(line) for line in done.stdout.splitlines()]
        assert np.allclose(found, expected, atol=1e-6)
        assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--chat", "-p", "the"], 2, "--embed makes no text: leave out --chat."),
        (["--raw", "-p", "the"], 2, "leave out --raw"),
        (["-p", "the", "--pooling", "max"], 2, "pooling (--pooling) is 'max'; allowed: mean, cls, last"),
        (["-p", "the order " * 200], 1, "text 0 has"),
        (["-p", " "], 1, "the prompt is empty"),
    ],
)
def test_errors(options: list[str], code: int, words: str, path: Path) -> None:
    done = run(path, "--embed", *options)
    assert (done.exit_code, done.stdout) == (code, "")
    assert words in done.stderr
