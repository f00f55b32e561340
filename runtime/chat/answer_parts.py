"""An answer in parts: what the model says, what it thinks, which tools it calls."""

from typing import Protocol

from gguf_run.formats.frozen import frozen


@frozen
class Part:
    """A piece of an answer. Parts in a row of one kind continue each other; "call" begins a new call."""

    kind: str  # "text", "reasoning", "call" (text is the name of a tool) or "arguments" (JSON, of the last call)
    text: str


class Splitter(Protocol):
    """Splits the text of an answer, piece by piece. What it has given is never taken back."""

    def push(self, text: str, /) -> list[Part]:
        """Return the parts that are certain now."""

    def end(self) -> list[Part]:
        """Return the rest: the answer is at its end."""
