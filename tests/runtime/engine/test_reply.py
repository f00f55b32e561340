"""Replies: from chosen tokens to text, and the reason to stop, with a tokenizer of a few lines."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_run.formats.errors import OptionError
from gguf_run.runtime.engine.reply import Reply
from gguf_run.runtime.engine.stop import StopStrings
from gguf_run.runtime.sampling.params import SamplingParams
from gguf_run.runtime.sampling.sampler import Sampler


class ByteStream:
    """Ids are bytes; gives out whole characters only, as the real stream does."""

    def __init__(self) -> None:
        self._bytes = b""

    def push(self, id: int) -> str:
        self._bytes += bytes([id % 256])
        try:
            text = self._bytes.decode()
        except UnicodeDecodeError:
            return ""
        self._bytes = b""
        return text

    def flush(self) -> str:
        return self._bytes.decode(errors="replace")


def pieces(ids: Sequence[int], stop: Sequence[str] = (), stop_id: int = 299, n_room: int = 99) -> tuple[list[str], str]:
    """The pieces of a reply that chooses these ids, and why it ended."""
    sampler = Sampler(SamplingParams(temperature=0))
    reply = Reply([1], sampler, ByteStream(), StopStrings(stop), frozenset([stop_id]), len(ids))  # type: ignore[arg-type]
    found = []
    for i, id in enumerate(ids):
        assert not reply.finish
        found.append(reply.take(id, i == n_room))
        if reply.finish:
            break
    assert reply.answer().text == "".join(found)
    assert reply.answer().finish == reply.finish
    return [piece for piece in found if piece], reply.finish


def test_characters_are_whole() -> None:
    assert pieces("aé€😀".encode()) == (["a", "é", "€", "😀"], "length")


def test_unfinished_character_at_the_end() -> None:
    assert pieces("a€".encode()[:-1]) == (["a", "�"], "length")


@pytest.mark.parametrize(
    ("text", "stop", "shown", "finish"),
    [
        ("one two", ["tw"], "one ", "stop"),
        ("one two", ["two", "one"], "", "stop"),
        ("ababac", ["abac"], "ab", "stop"),
        ("one tw", ["two"], "one tw", "length"),
        ("one", ["x"], "one", "length"),
    ],
)
def test_stop_strings(text: str, stop: list[str], shown: str, finish: str) -> None:
    found, reason = pieces(text.encode(), stop)
    assert ("".join(found), reason) == (shown, finish)


def test_reasons_to_stop() -> None:
    """A token of the model's that ends an answer is no text; of several reasons the first in this order is told."""
    assert pieces([97, 98, 299, 99]) == (["a", "b"], "stop")
    assert pieces([97, 98, 99], n_room=1) == (["a", "b"], "context")
    assert pieces([97, 98], n_room=1) == (["a", "b"], "length")
    assert pieces([97, 98], stop=["b"], n_room=1) == (["a"], "stop")


# Stop strings.


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_in_any_pieces(text: str, stop: list[str], data: st.DataObject) -> None:
    """However the text is cut: all before the first stop string comes out, and nothing is held back without need."""
    matcher = StopStrings(stop)
    shown, rest = "", text
    while rest:
        n = data.draw(st.integers(1, len(rest)))
        shown += matcher.push(rest[:n])
        rest = rest[n:]
        pushed = text[: len(text) - len(rest)]
        if not matcher.found:
            held = pushed.removeprefix(shown)
            assert shown + held == pushed
            assert held == "" or any(string.startswith(held) for string in stop)
    ends = [text.find(string) for string in stop if string in text]
    # A string found earlier in time may begin later than one found in the same push: never more is shown than before
    # the first that was complete.
    assert bool(matcher.found) == bool(ends)
    if not matcher.found:
        assert shown + matcher.flush() == text
    else:
        assert text.startswith(shown)
        assert not any(string in shown for string in stop)


@pytest.mark.parametrize("stop", [[""], ["a", ""], "text"])
def test_stop_not_allowed(stop: Any) -> None:
    with pytest.raises(OptionError, match="stop is"):
        StopStrings(stop)
