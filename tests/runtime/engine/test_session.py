"""Sessions that go on: the same logits after a restore, from Python and from the command line."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from texts import prefill
from tinymodel import TINY_GEMMA3, Tiny, vocabulary, write_tiny

from gguf_run.formats.errors import FormatError, GgufRunError
from gguf_run.runtime import Model
from gguf_run.runtime.cli.run import main
from gguf_run.runtime.engine.session_file import save

IDS = [5 + 7 * i % 250 for i in range(70)]
GREEDY = ["--temperature", "0", "-n", "8", "-t", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("session")
    write_tiny(folder / "llama.gguf", Tiny(n_ctx=512))
    write_tiny(folder / "gemma3.gguf", TINY_GEMMA3)
    write_tiny(folder / "other.gguf", Tiny(seed=1))
    Model.load(folder / "llama.gguf").close()  # compiles what is not cached yet
    return folder


def load(path: Path, n_ctx: int = 128, **options: object) -> Model:
    return Model.load(path, n_ctx=n_ctx, n_threads=2, n_batch=16, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["f16", "q4_0"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_logits_after_a_restore_are_identical(folder: Path, tmp_path: Path, name: str, kind: str) -> None:
    """In a context of another size too; the last layers of gemma3 hold a window only."""
    path, more = folder / f"{name}.gguf", [9, 3, 200]
    with load(path, cache_type=kind) as model:
        prefill(model.engine, IDS)
        model.save_session(tmp_path / "s", [{"role": "user", "content": "é"}])
        expected, n_reused = prefill(model.engine, IDS + more)
        assert n_reused == len(IDS)
        expected = expected.copy()
    for n_ctx in (128, 100):
        with load(path, n_ctx, cache_type=kind) as model:
            assert model.load_session(tmp_path / "s") == [{"role": "user", "content": "é"}]
            logits, n_reused = prefill(model.engine, IDS + more)
            assert n_reused == len(IDS)
            np.testing.assert_array_equal(logits, expected)


def test_a_restored_session_is_forgotten_where_a_prompt_differs(folder: Path, tmp_path: Path) -> None:
    with load(folder / "llama.gguf") as model:
        expected = prefill(model.engine, [*IDS[:20], 1, 2])[0].copy()
        prefill(model.engine, IDS)
        model.save_session(tmp_path / "s")
    with load(folder / "llama.gguf") as model:
        model.load_session(tmp_path / "s")
        logits, n_reused = prefill(model.engine, [*IDS[:20], 1, 2])
        assert n_reused == 20
        np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_sessions_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    with load(folder / "llama.gguf") as model:
        prefill(model.engine, IDS)
        model.save_session(tmp_path / "s")
    for name, n_ctx, kind, words in (
        ("other", 128, "f16", "is a session with another model, llama.gguf, not with other.gguf"),
        ("llama", 128, "f32", "its KV cache is f16, here it is f32: give the cache options"),
        ("llama", 69, "f16", "holds 70 tokens, the context 69: choose --ctx-size 70 or more"),
    ):
        with load(folder / f"{name}.gguf", n_ctx, cache_type=kind) as model:
            with pytest.raises(GgufRunError, match=words):
                model.load_session(tmp_path / "s")
            assert model.decoder.n_past == 0


def test_a_damaged_session_leaves_the_context_as_it_was(folder: Path, tmp_path: Path) -> None:
    with load(folder / "llama.gguf") as model:
        expected = prefill(model.engine, IDS)[0].copy()
        model.save_session(tmp_path / "s")
        data = bytearray((tmp_path / "s").read_bytes())
        data[-5] ^= 1
        (tmp_path / "s").write_bytes(data)
        with pytest.raises(FormatError, match="the session is damaged: its checksum differs: name another"):
            model.load_session(tmp_path / "s")
        logits, n_reused = prefill(model.engine, IDS)
        assert n_reused == len(IDS)
        np.testing.assert_array_equal(logits, expected)


def test_a_session_that_does_not_fit_leaves_an_empty_context(folder: Path, tmp_path: Path) -> None:
    with load(folder / "llama.gguf") as model:
        expected = prefill(model.engine, IDS)[0].copy()
        save(tmp_path / "s", replace(model._session_header(), ids=IDS), lambda: iter(()))
        with pytest.raises(FormatError, match=r"/s: the saved cache does not fit this model: parts are missing"):
            model.load_session(tmp_path / "s")
        logits, n_reused = prefill(model.engine, IDS)
        assert n_reused == 0
        np.testing.assert_array_equal(logits, expected)


# The command line.


def invoke(*arguments: object, stdin: str = "") -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), *GREEDY], input=stdin)


def test_a_chat_goes_on(folder: Path, tmp_path: Path) -> None:
    """Two runs say what one would have said, and the second computes only what is new."""
    chat = (folder / "llama.gguf", "--chat", "-c", 512, "--system", "Be brief.")
    whole = invoke(*chat, stdin="Hello\nAnd then?\n")
    session = ("--session", tmp_path / "s")
    first, second = invoke(*chat, *session, stdin="Hello\n"), invoke(*chat[:-2], *session, stdin="And then?\n")
    assert (first.exit_code, second.exit_code) == (0, 0), first.stderr + second.stderr
    assert first.stdout + second.stdout == whole.stdout
    assert "3 messages restored in" in second.stderr
    assert "known)" in second.stderr.splitlines()[-1]


def test_questions_go_on(folder: Path, tmp_path: Path) -> None:
    """--prompt continues the conversation as --chat does."""
    model, session = folder / "llama.gguf", ("-c", 512, "--session", tmp_path / "s")
    answers = [invoke(model, "-p", text, *session).stdout for text in ("Hello", "And then?")]
    assert "".join(answers) == invoke(model, "--chat", "-c", 512, stdin="Hello\nAnd then?\n").stdout


def test_a_session_of_raw_text(folder: Path, tmp_path: Path) -> None:
    model, session = folder / "llama.gguf", ("--raw", "--session", tmp_path / "s")
    invoke(model, "-p", "the order and", *session)
    again = invoke(model, "-p", "the order and another one", *session)
    assert "known)" in again.stderr.splitlines()[-1]
    assert again.stdout == invoke(model, "-p", "the order and another one", "--raw").stdout


def test_bad_sessions(folder: Path, tmp_path: Path) -> None:
    model = folder / "llama.gguf"
    for path, words in (
        (model, "is not a session, or it is damaged"),
        (tmp_path, "cannot be written: name a file in a folder that can be"),
        (tmp_path / "none" / "s", "cannot be written"),
    ):
        result = invoke(model, "-p", "Hello", "--session", path)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.splitlines()[-1].startswith("error: ")
        assert words in result.stderr
    assert model.read_bytes()[:4] == b"GGUF"


def test_a_full_context_goes_on(tmp_path: Path) -> None:
    """All tokens that were asked for come; without the option the context ends the answer."""
    never = np.zeros(len(vocabulary(Tiny())["tokens"]), np.float32)
    never[:3] = -1e9  # the tokens that end an answer
    write_tiny(tmp_path / "endless.gguf", Tiny(tensors={"output.bias": never}))
    arguments = (tmp_path / "endless.gguf", "-p", "the order and", "--raw", "-c", 128, "--temperature", 0, "-n", 150)
    options = [*map(str, arguments), "-t", "1", "--verbose"]
    results = [CliRunner().invoke(main, [*options, *more]) for more in ([], ["--context-shift", "--keep", "4"])]
    ended, full = [re.search(r"decode (\d+) in .*end: (\w+)", result.stderr) for result in results]
    assert (ended[2], full.groups()) == ("context", ("149", "length")), [result.stderr for result in results]
    assert results[1].stdout.startswith(results[0].stdout.rstrip("\n"))
    bad = CliRunner().invoke(main, [*options, "--context-shift", "--keep", "100"])
    assert (bad.exit_code, "n_keep (--keep) is 100" in bad.stderr) == (2, True)
