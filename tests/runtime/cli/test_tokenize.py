"""gguf-tokenize: what it prints, and how it ends."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from ggufbuild import write
from tinyvocab import CHARACTER, CONTROL, bpe_metadata

from gguf_run.runtime.cli.tokenize import main


@pytest.fixture
def model(tmp_path: Path) -> Path:
    metadata = bpe_metadata(["a b"], {"<|im_end|>": CONTROL}, bos_token_id=257, eos_token_id=257, add_bos_token=True)
    return write(tmp_path / "tiny.gguf", metadata)


def run(*args: Any, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], input=stdin)


def ids(text: str) -> list[int]:
    return [list(CHARACTER).index(byte) for byte in text.encode()]


def test_one_token_per_line(model: Path) -> None:
    result = run(model, "ab é\x1b")
    assert (result.exit_code, result.stderr) == (0, "")
    c3, a9 = ids("é")
    assert result.stdout.splitlines() == [
        "    257 '<|im_end|>'",
        "    256 'ab'",
        f"{ids(' ')[0]:>7} ' '",
        f"{c3:>7} b'\\xc3'",
        f"{a9:>7} b'\\xa9'",
        f"{ids(chr(27))[0]:>7} '\\x1b'",
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--ids"], [257, 256, 257]),
        (["--ids", "--no-special"], [256, *ids("<|im_end|>")]),
        (["--count"], 3),
        (["--count", "--no-special"], 11),
    ],
)
def test_ids_and_count(model: Path, options: list[str], expected: object) -> None:
    result = run(model, "ab<|im_end|>", *options)
    assert (result.exit_code, result.stdout) == (0, f"{expected}\n")


def test_a_second_bos_is_said(model: Path) -> None:
    result = run(model, "<|im_end|>ab", "--ids")
    assert (result.exit_code, result.stdout) == (0, "[257, 257, 256]\n")
    what = "the text begins with <|im_end|>, and the tokenizer puts another one before it: leave it out of the text"
    assert result.stderr == f"warning: {what}\n"
    assert run(model, "<|im_end|>ab", "--ids", "--no-special").stderr == ""


def test_text_from_a_file_and_from_stdin(model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfab\r\n")
    expected = f"{[257, 256, *ids(chr(13) + chr(10))]}\n"
    assert run(model, "--ids", "--file", tmp_path / "t.txt").stdout == expected
    assert run(model, "--ids", stdin=b"ab\r\n").stdout == expected
    assert run(model, "--no-special", stdin=b"").stdout == ""
    assert run(model, "", "--ids").stdout == "[257]\n"


@pytest.mark.parametrize(
    ("args", "stdin", "code", "message"),
    [
        (["MODEL", "a", "--file", "b"], None, 2, "give TEXT or --file, not both"),
        (["MODEL", "a", "--ids", "--count"], None, 2, "give --ids or --count, not both"),
        ([], None, 2, "Missing argument 'MODEL'"),
        (["MODEL", "--file", "missing.txt"], None, 1, "error: missing.txt: No such file or directory"),
        (["missing.gguf", "a"], None, 1, "error: missing.gguf: No such file or folder; gguf-run --list"),
        (["MODEL"], b"a\xff", 1, "error: stdin: byte 0xff at offset 1 is not valid UTF-8"),
    ],
)
def test_errors(model: Path, args: list[str], stdin: bytes | None, code: int, message: str) -> None:
    result = run(*[str(model) if arg == "MODEL" else arg for arg in args], stdin=stdin)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert code == 2 or len(result.stderr.splitlines()) == 1


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    result = run(write(tmp_path / "m.gguf", {"general.architecture": "llama"}), "a")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: tokenizer.ggml.model is missing")


def test_an_unknown_pre_tokenizer_is_one_line_on_stderr(tmp_path: Path) -> None:
    result = run(write(tmp_path / "m.gguf", bpe_metadata(pre="new\x1bname")), "a", "--ids")
    assert (result.exit_code, result.stdout) == (0, f"{ids('a')}\n")
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("warning: the file names the pre-tokenizer 'new\\x1bname', which is not known")


def test_an_adapter(tmp_path: Path) -> None:
    path = write(tmp_path / "lora.gguf", {"general.type": "adapter", "general.architecture": "llama"})
    assert "lora.gguf: is not a model but an adapter (LoRA)" in run(str(path), "x").stderr
