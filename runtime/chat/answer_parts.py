"""An answer in parts: what the model says, what it thinks, which tools it calls."""

from typing import NamedTuple, Protocol

# Tags that begin and end a block of reasoning: of DeepSeek-R1, Qwen3 and most others; of Magistral; of Seed-OSS; of
# Command A; of Gemma 4.
TAGS = {
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "<seed:think>": "</seed:think>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|channel>thought": "<channel|>",
}


class Part(NamedTuple):
    """A piece of an answer. Parts in a row of one kind continue each other; "call" begins a new call."""

    kind: str  # "text", "reasoning", "call" (text is the name of a tool) or "arguments" (JSON, of the last call)
    text: str


class Splitter(Protocol):
    """Splits the text of an answer, piece by piece. What it has given is never taken back."""

    def push(self, text: str, /) -> list[Part]:
        """Return the parts that are certain now."""

    def end(self) -> list[Part]:
        """Return the rest: the answer is at its end."""


def open_tag(prompt: str) -> str | None:
    """Return the tag that a prompt ends with: the template has begun the reasoning itself. None if there is no tag."""
    return next((tag for tag in TAGS if prompt.rstrip().endswith(tag)), None)
