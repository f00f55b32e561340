"""Texts that end an answer."""

from collections.abc import Sequence

from gguf_run.formats.errors import OptionError


class StopStrings:
    """Passes text on up to the first stop string. The end of a text waits if a stop string may begin there."""

    def __init__(self, strings: Sequence[str]) -> None:
        """OptionError for a single string instead of a list, and for an empty stop string."""
        if isinstance(strings, str) or not all(strings):
            raise OptionError(f"stop is {strings!r}; allowed: a list of texts that are not empty")
        self.found = ""  # the stop string that has come
        self._strings = tuple(strings)
        self._held = ""

    def push(self, text: str) -> str:
        """Take more text. Return the text that can be shown now: "" once a stop string was found."""
        if self.found:
            return ""
        text = self._held + text
        self._held = ""
        hits = [(at, string) for string in self._strings if (at := text.find(string)) >= 0]
        if hits:
            at, self.found = min(hits)
            return text[:at]
        n_hold = max((_n_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - n_hold :]
        return text[: len(text) - n_hold]

    def flush(self) -> str:
        """Return what was held back: no more text comes."""
        held, self._held = self._held, ""
        return held


def _n_overlap(text: str, string: str) -> int:
    """Return the length of the longest end of `text` that is a start of `string`."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)
