"""Messages of errors: one plain line, whatever a file holds."""

import pickle

import pytest

from gguf_run.formats.errors import FormatError, GgufRunError, OptionError, did_you_mean


@pytest.mark.parametrize("kind", [GgufRunError, FormatError, OptionError])
def test_a_message_is_one_plain_line(kind: type[GgufRunError]) -> None:
    error = kind("m.gguf: the name is a\nb\x1b[2J\u202e\ud800, é 漢字 stay: get it again")
    assert str(error) == r"m.gguf: the name is a\nb\x1b[2J\u202e\ud800, é 漢字 stay: get it again"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("filler", ["x", "\0"])
def test_a_long_message_keeps_its_end(filler: str) -> None:
    text = str(FormatError(f"m.gguf: the name is {filler * 100_000}: get it again"))
    assert len(text) < 1010
    assert text.startswith("m.gguf: the name is ")
    assert text.endswith(": get it again")
    assert " … " in text


def test_did_you_mean() -> None:
    assert did_you_mean("lama", ["llama", "gemma"]) == "did you mean llama? "
    assert did_you_mean("x", ["llama"]) == ""
