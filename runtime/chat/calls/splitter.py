"""Splits the text of an answer: what the model thinks first, then text and calls of tools in the form of its family."""

import json
import re
from collections.abc import Generator, Mapping
from functools import partial
from typing import Any

from gguf_run.runtime.chat.answer_parts import TAGS
from gguf_run.runtime.chat.calls.form import Form
from gguf_run.runtime.chat.calls.reader import Reader, Steps
from gguf_run.runtime.chat.calls.tools import field, types_of, value_json

# The first name in the object of a call. An object that begins with another one is text.
_NAMES = {"name", "tool_name", "function", "arguments", "parameters", "id", "type", "tool_call_id"}
_STARTS, _ENDS = ("<|start|>", "<|channel|>"), ("<|end|>", "<|call|>", "<|return|>")  # of a message of gpt-oss


class AnswerSplitter(Reader):
    """A Splitter for the answers of models of a form.

    tag: see open_tag. tools: schemas of arguments by the names of tools; a call of another tool is text.

    White space around calls and reasoning is dropped. Once a call has begun, its arguments are what the model writes,
    up to their end: if it writes no valid JSON, they are none.
    """

    def __init__(self, form: Form, tag: str | None, tools: Mapping[str, Any]) -> None:
        super().__init__()
        self._form, self._tag, self._tools = form, tag, tools
        self._n_looked = 0  # characters that are no call, whatever is in them
        self._say, self._argue = partial(self.give, "text"), partial(self.give, "arguments")

    def answer(self) -> Steps:
        """See Reader."""
        tag = self._tag or (yield from self.one_of(tuple(TAGS)))
        if tag:
            yield from self.skip_space()
            yield from self.until((TAGS[tag],), partial(self.give, "reasoning"))
            yield from self.one_of((TAGS[tag],))
            yield from self.skip_space()
        if self._form.name == "gpt-oss":
            yield from self._messages()
        elif self._tools:
            yield from self._calls()
        self._say(self.drop(len(self.text)))
        self.is_plain = True

    def _calls(self) -> Steps:
        """Read text and calls, up to the end of the answer; or calls alone, if they must begin it."""
        form = self._form
        while form.openers or (yield from self.until(form.triggers, self._say)):
            if (yield from self._call(form.first)):
                while (yield from self._call(form.next)):
                    pass
                yield from self._marks(f"]{form.end.lstrip(']')}" if form.has_objects else form.end)
                yield from self.skip_space()
            elif form.openers:
                return
            else:  # it only looks like a call
                self._say(self.drop(max(self._n_looked, len(self.text) - len(self.text.lstrip()) + 1)))

    def _call(self, pattern: re.Pattern[str]) -> Generator[None, None, bool]:
        """Read a call; False if there is none, and nothing is read. pattern: how it begins."""
        found = yield from self.match(pattern)
        self._n_looked = 0
        if not found:
            return (yield from self._object()) if self._form.has_objects else False
        if found["name"] not in self._tools:
            return False
        self.give("call", found["name"])
        self.drop(found.end())
        if self._form.key:
            yield from self._text_arguments(field(self._tools[found["name"]], "properties", dict))
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
        before, held = self.drop(self.text.index("{")), list[str]()
        yield from self.balanced(held.append)
        name, arguments = _call_of("".join(held))
        if name in self._tools:
            self.give("call", name)
            self._argue(arguments)
            return True
        looked = before + "".join(held)
        self.text, self._n_looked = looked + self.text, len(looked)
        return False

    def _marks(self, text: str) -> Steps:
        """Drop the marks of a text that come next, in this order. Models forget some."""
        for mark in re.findall(r"[\]}]|[^\s\]}]+", text):
            yield from self.one_of((mark,))

    def _text_arguments(self, schemas: Mapping[str, Any]) -> Steps:
        """Write JSON of arguments that stand between marks, as text. schemas: of the arguments, by names."""
        mark, pattern, between = self._form.close.strip(), self._form.argument, "{"
        marks = (f"\n{mark}", mark) if self._form.close.startswith("\n") else (mark,)
        while found := (yield from self.match(pattern)):
            self.drop(found.end())
            types, held = types_of(schemas.get(found["key"])), list[str]()
            is_text = types == {"string"}
            self._argue(f"{between}{json.dumps(found['key'], ensure_ascii=False)}: " + '"' * is_text)
            mark = yield from self.until(marks, self._argue_text if is_text else held.append, trim=False)
            if not mark:
                return  # the answer breaks off
            self.drop(len(mark))
            self._argue('"' if is_text else value_json("".join(held), types))
            between = ", "
        if self.is_ended and self.text.strip() and pattern.match(self.text):
            self.text = ""  # the answer breaks off before the value of an argument
        else:
            self._argue("{}" if between == "{" else "}")

    def _quoted_arguments(self) -> Steps:
        """Write JSON of arguments in Gemma's form: names have no quotes, strings have quotes of their own."""
        quote, depth = self._form.quote, 0
        while True:
            mark = yield from self.one_of((quote, *"{}[],:"))
            if mark == quote:
                self._argue('"')
                end = yield from self.until((quote,), self._argue_text, trim=False)
                self._argue('"' * (self.drop(len(end)) != ""))
            elif mark:
                depth += (mark in "{[") - (mark in "}]")
                self._argue(mark + " " * (mark in ",:"))
            else:
                word: list[str] = []
                yield from self.skip_space()
                mark = yield from self.until((*"{}[],:", quote), word.append)
                self._argue(value_json("".join(word), {"string"} if mark == ":" else set()) * bool(mark))
            if depth == 0 or (self.is_ended and not self.text):
                return

    def _argue_text(self, text: str) -> None:
        self._argue(json.dumps(text, ensure_ascii=False)[1:-1])

    def _messages(self) -> Steps:
        """Read the messages of gpt-oss, to the end of the answer: each has a header with its channel."""
        while True:
            begin = yield from self.one_of((*_STARTS, "to=", *_ENDS))
            if begin in (*_STARTS, "to="):
                header = [begin]
                yield from self.until(("<|message|>",), header.append)
                if (yield from self.one_of(("<|message|>",))):
                    yield from self._message("".join(header))
            elif not begin and not (yield from self.until(_STARTS, self._say)):
                return

    def _message(self, header: str) -> Steps:
        to = re.search(r"to=(?:functions\.)?([^\s<]+)", header)
        yield from self.skip_space()
        give = partial(self.give, "reasoning" if "<|channel|>analysis" in header else "text")
        if to and to[1] in self._tools:
            self.give("call", to[1])
            give = self._argue
            if self.text.startswith("{"):
                yield from self.balanced(give)
                yield from self.skip_space()
            else:
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
    is_call = isinstance(name, str) and isinstance(arguments, dict)
    return (name, json.dumps(arguments, ensure_ascii=False)) if is_call else ("", "")
