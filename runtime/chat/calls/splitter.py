"""Splits the text of an answer: what the model thinks first, then text and calls of tools in the form of its family."""

import json
import re
from collections.abc import Generator, Mapping
from typing import Any

from gguf_run.runtime.chat.answer_parts import TAGS
from gguf_run.runtime.chat.calls.form import Form
from gguf_run.runtime.chat.calls.reader import Reader, Steps
from gguf_run.runtime.chat.calls.tools import in_string, types_of, value_json

# The first name in the object of a call. An object that begins with another one is text.
_NAMES = {"name", "tool_name", "function", "arguments", "parameters", "id", "type", "tool_call_id"}
_ENDS = ("<|end|>", "<|call|>", "<|return|>")  # of a message of gpt-oss
_STARTS = ("<|start|>", "<|channel|>")


class AnswerSplitter(Reader):
    """A Splitter for the answers of models of a form.

    tag: see open_tag. tools: schemas of arguments by the names of tools; a call of another tool is text.

    White space around calls and reasoning is dropped. Once a call has begun, its arguments are what the model writes,
    up to their end: if it writes no valid JSON, they are none.
    """

    def __init__(self, form: Form, tag: str | None, tools: Mapping[str, Any]) -> None:
        super().__init__()
        self._form = form
        self._tag = tag
        self._tools = tools

    def answer(self) -> Steps:
        """See Reader."""
        tag = self._tag or (yield from self.one_of(tuple(TAGS)))
        if tag:
            yield from self.skip_space()
            yield from self.until((TAGS[tag],), self._think)
            yield from self.one_of((TAGS[tag],))
            yield from self.skip_space()
        if self._form.name == "gpt-oss":
            yield from self._messages()
        elif self._tools:
            yield from self._calls()
        yield from self.until((), self._say)

    def _say(self, text: str) -> None:
        self.give("text", text)

    def _think(self, text: str) -> None:
        self.give("reasoning", text)

    def _argue(self, text: str) -> None:
        self.give("arguments", text)

    def _argue_text(self, text: str) -> None:
        self._argue(in_string(text))

    def _calls(self) -> Steps:
        """Read text and calls, up to the end of the answer or, if calls can only begin it, up to its text."""
        form = self._form
        while True:
            trigger = "" if form.openers else (yield from self.until(form.triggers, self._say))
            if not (trigger or form.openers):
                return
            if (yield from self._call(form.first)):
                while (yield from self._call(form.next)):
                    pass
                yield from self._marks(form.end)
                yield from self.skip_space()
            elif trigger:  # it only looks like a call
                self._say(self.drop(self.text.find(trigger) + len(trigger)))
            else:
                return

    def _call(self, pattern: re.Pattern[str]) -> Generator[None, None, bool]:
        """Read a call; False if there is none, and nothing is read. pattern: how it begins."""
        found = yield from self.match(pattern)
        if not found:
            return (yield from self._object()) if self._form.has_objects else False
        if found["name"] not in self._tools:
            return False
        self.give("call", found["name"])
        self.drop(found.start("done"))
        if self._form.key:
            yield from self._text_arguments(self._tools[found["name"]].get("properties") or {})
        elif self._form.quote:
            yield from self._quoted_arguments()
        else:
            yield from self.balanced(self._argue)
        if self._form.has_objects and (yield from self.one_of((",",))):
            yield from self.balanced(lambda text: None, depth=1)  # more members
        yield from self._marks(self._form.tail)
        return True

    def _object(self) -> Generator[None, None, bool]:
        """Read a call whose object has another order than most: it is given when it is whole."""
        found = yield from self.match(self._form.object)
        if not found or found["key"] not in _NAMES:
            return False
        if found["key"] in ("name", "tool_name"):
            named = yield from self.match(self._form.named)
            if not named or named["name"] not in self._tools:
                return False
        held: list[str] = []
        before = self.drop(self.text.index("{"))
        yield from self.balanced(held.append)
        name, arguments = _call_of("".join(held))
        if name not in self._tools:
            self.text = before + "".join(held) + self.text
            return False
        self.give("call", name)
        self._argue(arguments)
        return True

    def _marks(self, text: str) -> Steps:
        """Drop the marks of a text that come next, in this order. Models forget some."""
        for mark in re.findall(r"[\]}]|[^\s\]}]+", text):
            yield from self.one_of((mark,))

    def _text_arguments(self, schemas: Mapping[str, Any]) -> Steps:
        """Write JSON of arguments that stand between marks, as text. schemas: of the arguments, by names."""
        between, pattern = "{", self._form.arguments
        while found := (yield from self.match(pattern)):
            self._argue(f"{between}{json.dumps(found['key'], ensure_ascii=False)}: ")
            self.drop(found.end())
            if not (yield from self._text_value(types_of(schemas.get(found["key"])))):
                return
            between = ", "
        if self.is_ended and self.text.strip() and pattern.match(self.text):
            self.text = ""  # the answer breaks off in the name of an argument
        else:
            self._argue("{}" if between == "{" else "}")

    def _text_value(self, types: set[str]) -> Generator[None, None, bool]:
        """Write JSON of the value of an argument. False if the answer breaks off."""
        mark = self._form.close.strip()
        marks = (f"\n{mark}", mark) if self._form.close.startswith("\n") else (mark,)
        if len(marks) == 2:
            while not (self.text or self.is_ended):
                yield
            self.drop(self.text.startswith("\n"))
        held: list[str] = []
        is_text = types == {"string"}
        self._argue('"' * is_text)
        mark = yield from self.until(marks, self._argue_text if is_text else held.append, trim=False)
        if mark:
            self._argue('"' if is_text else value_json("".join(held), types))
        self.drop(len(mark))
        return bool(mark)

    def _quoted_arguments(self) -> Steps:
        """Write JSON of arguments in Gemma's form: names have no quotes, strings have quotes of their own."""
        quote, depth = self._form.quote, 0
        while True:
            mark = yield from self.one_of((quote, *"{}[],:"))
            if mark == quote:
                self._argue('"')
                self.drop(len((yield from self.until((quote,), self._argue_text, trim=False))))
                self._argue('"' * (not self.is_ended or bool(self.text)))
            elif mark:
                depth += (mark in "{[") - (mark in "}]")
                self._argue(mark + " " * (mark in ",:"))
            else:
                word: list[str] = []
                mark = yield from self.until((*"{}[],:", quote), word.append)
                types = {"string"} if mark == ":" else set()
                self._argue(value_json("".join(word), types) * bool(mark))
            if depth == 0 or (self.is_ended and not self.text):
                return

    def _messages(self) -> Steps:
        """Read the messages of gpt-oss, to the end of the answer: each has a header with its channel."""
        while True:
            start = yield from self.one_of(("<|start|>assistant", "<|channel|>", "to=", *_ENDS))
            if start.startswith("<|c") or start == "to=":
                header = [start]
                yield from self.until(("<|message|>",), header.append)
                if (yield from self.one_of(("<|message|>",))):
                    yield from self._message("".join(header))
            elif not start:
                mark = yield from self.until(_STARTS, self._say)
                self._say((yield from self.one_of((mark,))) * (not self.text.startswith("assistant")))
                if not mark:
                    return

    def _message(self, header: str) -> Steps:
        to = re.search(r"to=(?:functions\.)?([^\s<]+)", header)
        give = self._think if "<|channel|>analysis" in header else self._say
        yield from self.skip_space()
        if to and to[1] in self._tools:
            self.give("call", to[1])
            give = self._argue
            if not self.text.startswith("{"):
                give("{}")
        yield from self.until((*_ENDS, *_STARTS), give)


def _call_of(text: str) -> tuple[str, str]:
    """Return the name and the arguments, as JSON, of a call that is an object; "" if it is none."""
    try:
        value = json.loads(text)
        value = value["function"] if isinstance(value.get("function"), dict) else value
        name = value.get("name") or value.get("tool_name") or value.get("function")
        arguments = value.get("arguments", value.get("parameters")) or {}
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, AttributeError, RecursionError):
        return "", ""
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return "", ""
    return name, json.dumps(arguments, ensure_ascii=False)
