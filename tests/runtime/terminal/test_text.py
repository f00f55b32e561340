import pytest

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.terminal.text import decode_text, one_line, size_text


def test_one_line() -> None:
    assert one_line("a\n b\t\x1b[2J\x00é\udcff") == "a b \\x1b[2J\\x00é\\udcff"


def test_decode_text_counts_from_the_first_byte() -> None:
    assert decode_text(b"\xef\xbb\xbfabc", "x") == "abc"
    with pytest.raises(GgufRunError, match="x: byte 0xff at offset 4 "):
        decode_text(b"\xef\xbb\xbfa\xff", "x")


def test_size_text() -> None:
    assert [size_text(n) for n in (999, 1_000, 2_345_678, 10**10)] == ["999 B", "1.00 kB", "2.35 MB", "10.00 GB"]
    assert size_text(98_362_432, 1) == "98.4 MB"
