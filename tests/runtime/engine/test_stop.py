"""Stop strings: what is shown, what is held back, in whatever pieces the text comes."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_run.formats.errors import OptionError
from gguf_run.runtime.engine.stop import StopStrings


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
    assert matcher.found == bool(ends)
    if not matcher.found:
        assert shown + matcher.flush() == text
    else:
        assert text.startswith(shown)
        assert not any(string in shown for string in stop)


@pytest.mark.parametrize("stop", [[""], ["a", ""], "text"])
def test_stop_not_allowed(stop: Any) -> None:
    with pytest.raises(OptionError, match="stop is"):
        StopStrings(stop)
