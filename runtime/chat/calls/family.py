"""Families of chat templates, by the form of their calls."""

from collections.abc import Sequence
from typing import Any

from gguf_run.formats.frozen import frozen
from gguf_run.runtime.chat.answer_parts import Part, Splitter


class _Plain:
    def push(self, text: str) -> list[Part]:
        return [Part("text", text)] if text else []

    def end(self) -> list[Part]:
        return []


@frozen
class Family:
    """What is known of a family of templates."""

    name: str = "plain"
    shows_special: bool = False

    def splitter(self, prompt: str, tools: Sequence[Any]) -> Splitter:
        """Return what splits an answer to a prompt."""
        return _Plain()

    def call_grammar(self, tools: Sequence[Any], choice: str, parallel: bool) -> str:
        """Return a Lark grammar of calls."""
        raise NotImplementedError


def family_of(template: str | None) -> Family:
    """Return the family of a template."""
    return Family()
