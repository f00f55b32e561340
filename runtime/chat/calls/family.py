"""The family of a model: how its answers are read, and how calls of tools are enforced."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gguf_run.formats.frozen import frozen
from gguf_run.runtime.chat.answer_parts import TAGS, Splitter, open_tag
from gguf_run.runtime.chat.calls.form import Form, form_of
from gguf_run.runtime.chat.calls.grammar import CallGrammar
from gguf_run.runtime.chat.calls.splitter import AnswerSplitter
from gguf_run.runtime.chat.calls.tools import schemas


@frozen
class Family:
    """Models whose chat templates write calls of tools in one form."""

    form: Form
    tag: str | None = None  # begins the reasoning, see TAGS; None: the template knows of none

    @property
    def name(self) -> str:
        """The name of the form, as "hermes"."""
        return self.form.name

    @property
    def shows_special(self) -> bool:
        """Control tokens must be a part of the text: they tell where calls begin."""
        return self.form.has_special

    def splitter(self, prompt: str, tools: Sequence[Mapping[str, Any]] | None) -> Splitter:
        """Return a splitter for one answer.

        prompt: of the answer; its end tells whether the template has begun the reasoning.
        tools: those that the model may call, as in OpenAI's API; a call of another tool is text.
        """
        return AnswerSplitter(self.form, open_tag(prompt), schemas(tools))

    def call_grammar(
        self,
        tools: Sequence[Mapping[str, Any]],
        choice: str,
        *,
        parallel: bool,
        prompt: str,
        token_id: Callable[[str], int | None] = lambda text: None,
    ) -> str | None:
        """Return a grammar of answers, in llguidance's dialect of Lark. What it allows, the splitter reads as calls.

        choice: "required": one call of any tool at least. "auto": text, in which calls have valid arguments; None for
        families whose calls look like other JSON. Otherwise the name of the tool that must be called.
        parallel: several calls may follow each other, where the family has a form for that.
        prompt: of the answer: it may have begun the reasoning, which stands before the calls.
        token_id: returns the id of the control token that a text is, None if it is none.
        """
        allowed = schemas(tools)
        if choice in allowed and choice not in ("required", "auto"):
            allowed = {choice: allowed[choice]}
        tag = open_tag(prompt)
        grammar = CallGrammar(self.form, allowed, token_id, tag or self.tag, tag is not None)
        return grammar.auto(parallel) if choice == "auto" else grammar.required(parallel)


def family_of(template: str | None) -> Family:
    """Return the family of a model. template: its chat template, None if it has none."""
    return Family(form_of(template), next((tag for tag in TAGS if template and tag in template), None))
