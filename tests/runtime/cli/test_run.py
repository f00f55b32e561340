"""gguf-run from outside: streams, exit codes, one line for each error, terminals, signals."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tinymodel import Tiny, vocabulary, write_tiny

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime import Model
from gguf_run.runtime import model as model_module
from gguf_run.runtime.cli import run as cli_run
from gguf_run.runtime.cli.run import main
from gguf_run.runtime.hub import listing

RUN = [sys.executable, "-c", "from gguf_run.runtime.cli.run import main; main(prog_name='gguf-run')"]
PATIENCE = 240  # seconds: a process that hangs is found, a busy machine is not
GREEDY = ["--temperature", "0", "-n", "8"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny(path, Tiny(n_ctx=4096))
    Model.load(path).close()  # compiles what is not cached yet: no test is to see the line that says so
    return path


def run(*arguments: Any, stdin: bytes = b"", **environment: str) -> "subprocess.CompletedProcess[bytes]":
    """In a process of its own."""
    command = [*RUN, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=PATIENCE, env=os.environ | environment)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never comes to the end of its answer, in a context that lasts for a while."""
    path = tmp_path_factory.mktemp("endless") / "tiny.gguf"
    never = np.zeros(len(vocabulary(Tiny())["tokens"]), np.float32)
    never[:3] = -1e9  # the tokens that end an answer
    write_tiny(path, Tiny(n_ctx=65536, tensors={"output.bias": never}))
    Model.load(path).close()  # see path
    return path


def long_answer(endless: Path) -> "subprocess.Popen[bytes]":
    options = ["-p", "Hello", "-n", "60000", "-c", "65536", "--temperature", "5", "--top-k", "0", "--seed", "1"]
    return subprocess.Popen([*RUN, str(endless), *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def invoke(*arguments: Any, stdin: bytes = b"") -> Result:
    """In this process. An exception other than the exit is a failure."""
    result = CliRunner().invoke(main, list(map(str, arguments)), input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert "internal error" not in result.stderr
    return result


def error_line(result: Result, code: int) -> str:
    """The only line of stderr."""
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("error: ")


# What comes out.


def test_answer_on_stdout_and_figures_on_stderr(path: Path) -> None:
    done = run(path, "--prompt", "Hello", "--system", "Be kind.", "--threads", 2, *GREEDY)
    assert done.returncode == 0
    with Model.load(path) as model:
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
        answer = "".join(model.chat(messages, temperature=0, max_tokens=8))
        n_prompt = model.stats.n_prompt
    assert done.stdout.decode() == answer + "\n"
    figures = (
        r"load [\d.]+ s \| prefill %d tokens in [\d.]+ s, \d+/s \| decode \d+ in [\d.]+ s, \d+/s \| 2 layers on CPU, 2"
    )
    assert re.match(figures % n_prompt, done.stderr.decode())
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("source", ["PROMPT", "--prompt", "--file", "stdin", "-"])
def test_raw_prompt_from_everywhere(path: Path, tmp_path: Path, source: str) -> None:
    text = "the order — 😀\n"
    (tmp_path / "prompt.txt").write_text("\ufeff" + text, encoding="utf-8")  # editors on Windows write the mark
    sources: dict[str, list[Any]] = {
        "--prompt": ["--prompt", text], "--file": ["--file", tmp_path / "prompt.txt"], "stdin": [], "-": ["-f", "-"],
        "PROMPT": [text],
    }  # fmt: skip
    result = invoke(path, "--raw", *sources[source], *GREEDY, stdin=text.encode())
    assert result.exit_code == 0
    with Model.load(path) as model:
        expected = "".join(model.generate(text, temperature=0, max_tokens=8))
    assert result.stdout == expected.rstrip("\n") + "\n"


def test_seed_and_verbose(path: Path) -> None:
    first = invoke(path, "-p", "Hello", "--verbose", "-n", 5)
    assert "llama: n_layer 2, n_embd 96" in first.stderr
    assert "end: length" in first.stderr
    seed = re.search(r"seed (\d+)", first.stderr)
    assert seed is not None
    assert invoke(path, "-p", "Hello", "--seed", seed[1], "-n", 5).stdout == first.stdout


def test_full_context_is_said(path: Path) -> None:
    result = invoke(path, "--raw", "-p", "x" * 38, "-c", 40, "--temperature", 0)
    assert result.exit_code == 0
    assert result.stderr.startswith(
        "the context is full (40 tokens), the answer ends here: choose a larger --ctx-size or --context-shift\n"
    )
    assert "decode 2 in" in result.stderr


def test_an_answer_has_a_limit_that_is_said(path: Path, endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the user has named one; -1 is none."""
    monkeypatch.setattr(cli_run, "MAX_TOKENS", 9)
    said = "the answer ends here, after 9 tokens: --max-tokens N allows more, -1 any number\n"
    for options in (["Hello"], ["--raw", "Hello"]):
        result = invoke(endless, *options)
        assert result.stderr.startswith(said)
        assert " | decode 8 in " in result.stderr
    result = invoke(endless, "Hello", "-n", 9)
    assert (result.stderr.startswith("load "), " | decode 8 in " in result.stderr) == (True, True)
    result = invoke(endless, "Hello", "-n", -1, "-c", 100)
    assert "the context is full (100 tokens)" in result.stderr


def test_stop_texts_end_an_answer(path: Path) -> None:
    whole = invoke(path, "--raw", "Hello", *GREEDY).stdout.rstrip("\n")
    first, second = whole[3:5], whole[5:7]
    before = min(whole.index(first), whole.index(second))
    assert invoke(path, "--raw", "Hello", *GREEDY, "--stop", second, "--stop", first).stdout == whole[:before] + "\n"


@pytest.mark.parametrize(("options", "n"), [([], 512), (["-b", 20], 20), (["-ub", 7], 7), (["-b", 9, "-ub", 8], 8)])
def test_sizes_of_batches(path: Path, monkeypatch: pytest.MonkeyPatch, options: list[Any], n: int) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(cli_run._Task, "run", lambda task, model: sizes.append(model.decoder.n_batch))
    assert invoke(path, "Hello", *options).exit_code == 0
    assert sizes == [n]


def test_context_beyond_the_model_is_a_warning(path: Path) -> None:
    result = invoke(path, "-p", "Hello", "-c", 5000, "-n", 1)
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: context of 5000 tokens: the model was trained with 4096")
    assert result.stderr.count("\n") == 2


def test_help_and_version() -> None:
    assert "--temperature FLOAT" in invoke("--help").stdout
    assert re.fullmatch(r"gguf-run, version \d.*\n", invoke("--version").stdout)


def test_kernels_compile_without_a_cache(path: Path) -> None:
    """A cache folder that cannot be written: a warning, one line for the wait, and the answer."""
    done = run(path, "-p", "Hello", *GREEDY, XDG_CACHE_HOME="/dev/null")
    assert done.returncode == 0
    assert done.stdout == run(path, "-p", "Hello", *GREEDY).stdout
    lines = done.stderr.decode().splitlines()
    assert [line for line in lines if line.startswith("warning: /dev/null/gguf-run/kernels-")]
    assert len([line for line in lines if line.startswith("compiling kernels")]) == 1
    assert len(lines) == 3


# Bad input.


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "No such file"),
        ("directory", "directory"),
        (b"", "empty|shorter|too short"),
        (b"GGU", ""),
        (b"<html>", "web page"),
        (b"GGUF" + bytes(100), "version"),
    ],
)
def test_not_a_model(tmp_path: Path, content: bytes | str | None, expected: str) -> None:
    path = tmp_path / "x.gguf"
    if content == "directory":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    line = error_line(invoke(path, "-p", "Hello"), 1)
    assert "x.gguf" in line
    assert re.search(expected, line)


def test_unknown_architecture(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_tiny(path, Tiny(arch="no\x1b[31msuch\narch"))
    line = error_line(invoke(path, "-p", "Hello"), 1)
    assert "which is not known; the nearest that this program runs is llama: the file" in line
    assert "\x1b" not in line


def test_truncated_model(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    (tmp_path / "x.gguf").write_bytes(data[:-1])
    assert "x.gguf" in error_line(invoke(tmp_path / "x.gguf", "-p", "Hello"), 1)


def test_prompt_longer_than_context(path: Path) -> None:
    line = error_line(invoke(path, "--raw", "-p", "x" * 50, "-c", 20), 1)
    assert line.startswith("the prompt has 50 tokens, the context holds 20: ")


def test_context_that_does_not_fit_into_memory(path: Path) -> None:
    line = error_line(invoke(path, "-p", "x", "-c", 2_000_000_000), 1)
    need = r"1024\.00 GB needed .* KV cache of 2000000000 tokens as f16 1024\.00 GB\)"
    assert re.search(rf"out of memory: {need}, [\d.]+ GB available: --ctx-size \d+ would fit", line)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--temperature", "-1", "temperature is -1.0; allowed: 0"),
        ("--temperature", "nan", "temperature is nan"),
        ("--top-k", "-1", "top_k is -1"),
        ("--top-p", "1.5", "top_p is 1.5"),
        ("--min-p", "-0.1", "min_p is -0.1"),
        ("--repeat-penalty", "0", "repeat_penalty is 0.0"),
        ("--seed", "-1", "seed is -1"),
        ("--max-tokens", "0", "--max-tokens) is 0"),
        ("--ubatch-size", "0", "n_batch is 0"),
        ("--ctx-size", "0", "--ctx-size) is 0"),
        ("--threads", "0", "--threads) is 0"),
        ("--device", "tpu", "--device 'tpu': allowed are cpu, cuda"),
    ],
)
def test_option_values(path: Path, option: str, value: str, expected: str) -> None:
    assert expected in error_line(invoke(path, "-p", "Hello", option, value), 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--temperature", "hot"],
        ["--no-such-option"],
        ["-p", "a", "-f", "b"],
        ["a.gguf", "a text", "-p", "b"],
        ["-p", "a", "--raw", "--chat"],
        ["-p", "a", "--raw", "--system", "b"],
        ["a.gguf", "b.gguf"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr
    assert result.stdout == ""


def test_device_that_is_not_there(path: Path) -> None:
    """Nor is what runs it, or it is not built for it."""
    line = error_line(invoke(path, "-p", "Hello", "--device", "cuda:99"), 1)
    assert re.search("--device cuda:99: (torch is not installed|this torch .* is built for CPUs only|.* GPU)", line)


@pytest.mark.parametrize("source", ["--file", "stdin", "--prompt", "--system"])
def test_invalid_utf8(path: Path, tmp_path: Path, source: str) -> None:
    data = b"abc\xff\xfe"
    (tmp_path / "prompt.txt").write_bytes(data)
    # As Python hands over the bytes of a command line.
    argument = data.decode(errors="surrogateescape")
    arguments: dict[str, list[Any]] = {
        "--file": ["--file", tmp_path / "prompt.txt"], "stdin": [], "--prompt": ["-p", argument],
        "--system": ["-p", "Hello", "--system", argument],
    }  # fmt: skip
    line = error_line(invoke(path, *arguments[source], stdin=data), 1)
    name = {"--file": "prompt.txt"}.get(source, source)
    assert f"{name}: byte 0xff at offset 3 is not valid UTF-8" in line


@pytest.mark.parametrize("arguments", [["-p", ""], ["-p", " \n"], []])
def test_empty_prompt(path: Path, arguments: list[str]) -> None:
    assert "the prompt is empty" in error_line(invoke(path, *arguments), 1)


def test_missing_prompt_file(path: Path) -> None:
    assert error_line(invoke(path, "-f", "no-such.txt"), 1) == "no-such.txt: No such file or directory\n"
    assert "is a directory, not a file" in error_line(invoke(path, "-f", path.parent), 1)


def test_pipes_and_devices(path: Path, tmp_path: Path) -> None:
    """Nothing waits for a writer, and nothing is written in their place."""
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", Path(os.devnull)):
        for option, words in (
            ("--file", "is a device or pipe, not a file"), ("--tools", "is a device or pipe, not a file"),
            ("--cache-scales", "is a device or pipe, not a file"), ("--session", "cannot be written: name a file"),
        ):  # fmt: skip
            arguments = ["--file", name] if option == "--file" else ["-p", "Hello", option, name]
            line = error_line(invoke(path, *arguments), 1)
            assert str(name) in line
            assert words in line
        assert not name.is_file()
    text, big = tmp_path / "text", tmp_path / "big"
    text.write_text("no session")
    big.write_bytes(b"")
    os.truncate(big, 1 << 33)
    assert "is not a session, or it is damaged" in error_line(invoke(path, "-p", "Hello", "--session", text), 1)
    for option in ("--tools", "--cache-scales", "--file"):
        arguments = [option, big] if option == "--file" else ["-p", "Hello", option, big]
        assert "is larger than 67108864 bytes" in error_line(invoke(path, *arguments), 1)


def test_endless_stdin(path: Path) -> None:
    with open("/dev/zero", "rb") as zeros:
        done = subprocess.run([*RUN, str(path)], stdin=zeros, capture_output=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert done.stderr == b"error: stdin is larger than 67108864 bytes, the most that is read of a text\n"


def test_warm_up(path: Path) -> None:
    """Nothing is answered; stdin, a terminal in most cases, is not read."""
    done = invoke(path, "--warm-up")
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr.startswith("load ")


def test_warm_up_names_its_model(path: Path) -> None:
    """`--warm-up MODEL` is as `MODEL --warm-up`."""
    assert invoke("--warm-up", path).stderr.startswith("load ")
    assert "No such file" in invoke("--warm-up", "no-such.gguf").stderr


def test_warm_up_all(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that --list shows; a damaged model does not stop the others."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(listing, "models_dir", lambda: tmp_path)  # no default model
    repo = tmp_path / "hub/models--o--r"
    (repo / "snapshots/0123").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("0123")
    (repo / "snapshots/0123/a-Q4_0.gguf").write_bytes(b"GGUF")
    (repo / "snapshots/0123/b-Q8_0.gguf").symlink_to(path)
    result = invoke("--warm-up", "all")
    lines = result.stderr.splitlines()
    assert (result.exit_code, [lines[0], lines[2]]) == (1, ["hf:o/r:Q4_0:", "hf:o/r:Q8_0:"])
    assert lines[1].startswith("error: ")
    assert lines[3].startswith("load ")
    assert lines[4:] == ["error: 1 models cannot be run; the others are ready"]


def test_no_chat_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """A base model's prompt is continued; what needs a template says so."""
    from gguf_run.runtime.load import load_model

    monkeypatch.setattr(load_model, "chat_template", lambda *_: None)
    plain = invoke(path, "-p", "Hello", *GREEDY)
    assert plain.stdout == invoke(path, "--raw", "-p", "Hello", *GREEDY).stdout
    for arguments in (["--chat"], ["-p", "Hello", "--system", "x"]):
        assert "the model has no chat template" in error_line(invoke(path, *arguments, stdin=b"Hello\n"), 1)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), "error: out of memory: choose a smaller model"),
        (RuntimeError("can't start new thread"), "error: out of memory (can't start new thread): choose"),
        (MemoryError("9 GiB"), "error: out of memory (9 GiB): choose"),
        (OSError(28, "No space left on device", "a\nb"), r"error: a b: No space left on device"),
        (GgufRunError("two\nlines \x1b[0m"), r"error: two\nlines \x1b[0m"),
        (KeyError("x"), "error: internal error, please report it: KeyError: 'x' (test_run.py:"),
    ],
)
def test_any_error_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str) -> None:
    def fail(*_: Any, **__: Any) -> Model:
        raise error

    monkeypatch.setattr(model_module.Model, "load", fail)
    result = CliRunner().invoke(main, ["x.gguf", "-p", "Hello"])
    assert result.exit_code == 1
    assert result.stderr.startswith(expected)
    assert result.stderr.count("\n") == 1
    verbose = CliRunner().invoke(main, ["x.gguf", "-p", "Hello", "--verbose"])
    assert "Traceback" in verbose.stderr


# stdout that goes away.


def test_pipe_to_head(endless: Path) -> None:
    with long_answer(endless) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(PATIENCE) == 141


def test_full_disk(path: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*RUN, str(path), "-p", "Hello"], stdout=full, stderr=subprocess.PIPE, timeout=PATIENCE)
    assert done.returncode == 1
    assert done.stderr == b"error: No space left on device\n"


def test_closed_stdout(path: Path) -> None:
    shell = ["sh", "-c", '"$@" >&-', "sh"]
    done = subprocess.run([*shell, *RUN, str(path), "-p", "Hello"], stderr=subprocess.PIPE, timeout=PATIENCE)
    assert done.returncode == 1
    assert done.stderr == b"error: stdout is closed: there is nowhere to write to\n"


def test_terminal_without_unicode(path: Path) -> None:
    done = run(path, "--raw", "-p", "é" * 20, *GREEDY, PYTHONIOENCODING="ascii")
    assert done.returncode == 0


def test_ctrl_c_ends_an_answer(endless: Path) -> None:
    with long_answer(endless) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 130
        assert err.strip() == b""


# Talking.


def test_chat_remembers(path: Path) -> None:
    result = invoke(path, "--chat", *GREEDY, stdin=b"Hello\n\nAnd then?\n")
    assert result.exit_code == 0
    with Model.load(path) as model:
        messages = [{"role": "user", "content": "Hello"}]
        first = "".join(model.chat(messages, temperature=0, max_tokens=8))
        messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
        second = "".join(model.chat(messages, temperature=0, max_tokens=8))
    assert result.stdout == f"{first}\n{second}\n"
    assert " known) tokens in " in result.stderr


def test_chat_begins_with_the_prompt(path: Path) -> None:
    both = invoke(path, "--chat", *GREEDY, stdin=b"Hello\nMore\n")
    assert invoke(path, "--chat", "-p", "Hello", *GREEDY, stdin=b"More\n").stdout == both.stdout


def test_chat_forgets_the_oldest_turns(path: Path) -> None:
    """Each turn takes some 50 tokens, so that two fit."""
    result = invoke(path, "--chat", "-c", 120, *GREEDY, stdin=b"a short question of mine\n" * 6)
    assert result.exit_code == 0
    line = "the conversation is longer than the context (120 tokens): its oldest turn is left out\n"
    assert result.stderr.count(line) >= 3


def test_chat_message_that_never_fits(path: Path) -> None:
    result = invoke(path, "--chat", "-c", 60, *GREEDY, stdin=b"x" * 100 + b"\n")
    assert "tokens, the context holds 60" in error_line(result, 1)


def test_chat_invalid_utf8(path: Path) -> None:
    assert "stdin: byte 0xff at offset 1" in error_line(invoke(path, "--chat", *GREEDY, stdin=b"a\xff\n"), 1)


class Terminal:
    """A process on a terminal of its own: stdin, stdout and stderr."""

    def __init__(self, arguments: Sequence[Any], columns: int = 80) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            [*RUN, *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            # Line editing without escape codes; the width is the terminal's own.
            env={name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"TERM": "dumb"},
        )
        os.close(slave)
        self.shown = ""

    def wait_for(self, text: str) -> str:
        """Read until `text` has been shown after what was waited for before; return what came before it."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self._master, 4096).decode(errors="replace")
                except OSError:  # the other end is closed
                    assert text in self.shown, self.shown
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(endless: Path) -> Iterator[Terminal]:
    terminal = Terminal([endless, "--chat", "--no-history", "--seed", "1", "--temperature", "5", "-c", "65536"])
    yield terminal
    terminal.close()


def test_terminal_chat(terminal: Terminal) -> None:
    """A bar while loading; Ctrl-C stops an answer, not the program; Ctrl-D leaves."""
    terminal.wait_for("loading [")
    terminal.wait_for("\r\n> ")
    for _ in range(2):
        terminal.type("Hello\n")
        terminal.wait_for("Hello\r\n")
        time.sleep(0.1)  # in the middle of a long answer
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("\r\n> ")
    # The prompt is shown before readline waits for keys: what comes in between is seen late or not at all.
    time.sleep(0.5)
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for("(Ctrl-C once more or Ctrl-D ends the chat)\r\n> ")
    time.sleep(0.5)
    terminal.type("\x04")
    terminal.wait_for("load ")
    assert terminal.process.wait(PATIENCE) == 0


@pytest.mark.parametrize("columns", [40, 80])
def test_terminal_of_a_newcomer(path: Path, columns: int) -> None:
    """A model alone starts the chat: a banner that fits, commands that Tab completes, answers that fit."""
    terminal = Terminal([path, "--no-history", "--seed", "1", "--temp", "5", "-n", "40"], columns)
    try:
        terminal.wait_for("tiny, llama ")
        terminal.wait_for("context 4096 tokens")
        terminal.wait_for("/help lists the commands, Ctrl-D leaves\r\n> ")
        terminal.type("Hello\n")
        terminal.wait_for("Hello\r\n")
        terminal.wait_for("\r\n> ")
        terminal.type("/st\t\n")
        terminal.wait_for("/stats ")
        terminal.wait_for("tokens\r\n> ")
        terminal.type("/?\n")
        help = terminal.wait_for("several lines.\r\n> ")
        assert max(map(len, help.split("\r\n"))) <= columns
        assert " conversation" in help
        terminal.type("/bye\n")
        terminal.wait_for("load ")
        assert terminal.process.wait(PATIENCE) == 0
    finally:
        terminal.close()


def test_answers_of_a_form(path: Path, tmp_path: Path) -> None:
    """A schema as JSON or in a file, a grammar in GBNF or Lark, and what cannot be one."""
    pytest.importorskip("llguidance")
    (tmp_path / "schema.json").write_text('{"enum": ["é", 7]}')
    (tmp_path / "a.gbnf").write_text('root ::= "a"{3} "\\n"?')
    (tmp_path / "a.lark").write_text("start: /[xy]{4}/")
    for option, value, pattern in (
        ("--json-schema", '{"type": "boolean"}', "true|false"),
        ("--json-schema", tmp_path / "schema.json", '"é"|7'),
        ("--grammar", tmp_path / "a.gbnf", "aaa\n?"),
        ("--grammar", tmp_path / "a.lark", "[xy]{4}"),
    ):
        result = run(path, "--raw", "-p", "a", option, value)
        assert result.returncode == 0, result.stderr
        assert re.fullmatch(f"({pattern})\n*", result.stdout.decode())
    for arguments, words in (
        (["--json-schema", "{}", "--grammar", tmp_path / "a.lark"], b"exclude each other"),
        (["--json-schema", '{"not": {}}'], b"the keyword not at # is not supported"),
        (["--json-schema", tmp_path / "none.json"], b"none.json"),
    ):
        result = run(path, "--raw", "-p", "a", *arguments)
        assert result.returncode in (1, 2)
        assert words in result.stderr
        assert result.stderr.count(b"\n") == 1
