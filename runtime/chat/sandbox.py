"""Runs a chat template in Jinja's sandbox, and fits messages to templates that have no place for a part of them.

Settings, filters and functions are those of Hugging Face transformers, for which templates are written. The sandbox
keeps a template away from Python's internals, from files and from changing its arguments. worker.py limits the rest.
"""

import json
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from hashlib import sha256
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_REASON = 300  # characters of a template's error that are shown
NO_SYSTEM = "the chat template has no place for a system message: the user's message begins with it"
NO_LATER_SYSTEM = "the chat template has no place for a later system message: a message of the user's has its text"
NO_TOOLS = "the chat template has no place for tools: the model does not learn of them"
NO_CALLS = "the chat template has no place for tool calls: the model does not see its earlier ones"
# How published templates want messages with calls: content where there is no text, whether arguments are strings.
_CALL_FORMS: list[tuple[str | None, bool]] = [("", False), ("", True), (None, True), (None, False)]
_MARK = "gguf_run_mark"  # a template that has a place for it shows it in a trial
_USER = {"role": "user", "content": "Hello"}

Messages = list[dict[str, Any]]
Render = Callable[[dict[str, Any]], str]  # a template: variables in, text out


def render(source: str, variables: dict[str, Any]) -> dict[str, Any]:
    """Return {"text": the prompt, "notes": what the user should know}, or {"error": where and why it failed}.

    source: the template. variables: what it can name, "messages" in the form of messages.py among them.
    """
    try:
        template, notes = _compiled(source), list[str]()
        variables = variables | {"messages": fitted(source, variables, notes)}
        text = template(variables)
        if variables["tools"] and text == _trial(template, variables | {"tools": None}):
            notes.append(NO_TOOLS)
        return {"text": text, "notes": notes}
    except MemoryError:
        raise
    except RecursionError:
        return {"error": ": it is nested too deeply or calls itself: choose another template (--chat-template)"}
    except Exception as error:  # a program from a stranger: it may raise anything
        return {"error": _reason(error)}


def fitted(source: str, variables: dict[str, Any], notes: list[str]) -> Messages:
    """Return the messages, changed where the template would drop or refuse what it could show in another form.

    notes: gets a line for each thing that has no place. Trials with other messages tell what a template shows.
    """
    template, messages = _compiled(source), variables["messages"]
    if "developer" not in source:  # the newer name of "system" in OpenAI's API
        messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]
    if any(m["role"] == "system" for m in messages):
        system = {"role": "system", "content": _MARK}
        if _MARK not in _trial(template, variables | {"messages": [system, _USER]}):
            messages = _without_system(messages)
            notes.append(NO_SYSTEM)
        else:
            messages = _without_later_system(template, variables | {"messages": messages}, notes)
    if any("tool_calls" in m for m in messages):
        function: dict[str, Any] = {"name": "f", "arguments": {_MARK: "value"}}
        call = {"role": "assistant", "content": "", "tool_calls": [{"id": "call12345", "function": function}]}
        result = {"role": "tool", "name": "f", "tool_call_id": "call12345", "content": "1"}
        for form in _CALL_FORMS:
            text = _trial(template, variables | {"messages": [_USER, _calls_as(call, *form), result]})
            # It is there, neither escaped twice nor as Python writes it.
            if _MARK in text and f"'{_MARK}'" not in text and f'\\"{_MARK}' not in text:
                function["arguments"] = _MARK  # a string that is no object: many templates ask for the items of one
                is_shown = _MARK in _trial(template, variables | {"messages": [_USER, _calls_as(call, *form), result]})
                function["arguments"] = {_MARK: "value"}
                talk = [_USER, _calls_as(call, *form), result]
                messages = _with_results(template, variables, talk, messages)
                return [_calls_as(m, *form, is_shown) if "tool_calls" in m else m for m in messages]
        notes.append(NO_CALLS)
    return messages


def _with_results(template: Render, variables: dict[str, Any], talk: Messages, messages: Messages) -> Messages:
    """Return messages, changed for templates that are strict about results of tools, as Mistral's are.

    Where the template refuses others, ids of calls become short, and a result gets the text of the user behind it.
    talk: a user's message, a call and its result, which the template shows.
    """
    if not _trial(template, variables | {"messages": [_with_ids(m, lambda id: f"call_{id}") for m in talk]}):
        messages = [_with_ids(message, lambda id: sha256(id.encode()).hexdigest()[:9]) for message in messages]
    if _trial(template, variables | {"messages": [*talk, _USER]}):
        return messages
    found = Messages()
    for message in messages:
        if message["role"] == "user" and found and found[-1]["role"] == "tool":
            found[-1] = found[-1] | {"content": f"{found[-1]['content']}\n{message['content']}"}
        else:
            found.append(message)
    return found


def _with_ids(message: dict[str, Any], new: Callable[[str], str]) -> dict[str, Any]:
    """Return a message with a new id for each call that it has, or that it is the result of."""
    if "tool_call_id" in message:
        return message | {"tool_call_id": new(message["tool_call_id"])}
    if "tool_calls" not in message:
        return message
    return message | {"tool_calls": [call | {"id": new(str(call.get("id")))} for call in message["tool_calls"]]}


def _without_later_system(template: Render, variables: dict[str, Any], notes: list[str]) -> Messages:
    """Return messages without the system messages, beside a first one, that the template does not show."""
    messages: Messages = variables["messages"]
    marks = {i: f"{_MARK}{i}." for i, m in enumerate(messages) if m["role"] == "system"}
    n_kept = int(0 in marks and any(m["role"] == "user" for m in messages))
    if len(marks) > n_kept:
        marked = [m | {"content": marks.get(i, m["content"])} for i, m in enumerate(messages)]
        text = _trial(template, variables | {"messages": marked})
        if not all(mark in text for mark in marks.values()):
            notes.append(NO_LATER_SYSTEM)
            return messages[:n_kept] + _without_system(messages[n_kept:])
    return messages


def _without_system(messages: Messages) -> Messages:
    """Make system messages the user's. Each stays in its place, and joins the user's messages beside it.

    What stands before it therefore never changes, and the cache knows it, however the conversation goes on.
    """
    found, joins = Messages(), False
    for message in messages:
        is_system = message["role"] == "system"
        if is_system and not message["content"]:
            continue
        own = _USER | {"content": message["content"]} if is_system else message
        if found and (is_system or joins) and found[-1]["role"] == own["role"] == "user":
            found[-1] = found[-1] | {"content": f"{found[-1]['content']}\n{own['content']}"}
        else:
            found.append(own)
        joins = is_system
    return found


def _calls_as(message: dict[str, Any], empty: str | None, as_text: bool, keeps_text: bool = True) -> dict[str, Any]:
    """Return a message with calls in a form. keeps_text: False: arguments that are a string go into an object."""
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        if isinstance(arguments, str):
            arguments = arguments if keeps_text else {"arguments": arguments}
        elif as_text:
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append(call | {"function": call["function"] | {"arguments": arguments}})
    return message | {"content": message["content"] or empty, "tool_calls": calls}


def _trial(template: Render, variables: dict[str, Any]) -> str:
    """Return what a template makes of the variables, "" if it refuses them."""
    try:
        return template(variables)
    except MemoryError:
        raise
    except Exception:
        return ""


def _reason(error: Exception) -> str:
    """Return where and why a template failed, on one line."""
    line = f" in line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
    try:
        reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
    except Exception:  # it holds an object of the template's that cannot be written
        reason = type(error).__name__
    return f"{line}: {' '.join(reason[: 4 * MAX_REASON].split())[:MAX_REASON] or type(error).__name__}"


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on; it changes nothing in a prompt."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # Jinja only asks what it contains

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(8)
def _compiled(source: str) -> Render:
    """Return the template. One that shows content as a list of parts only, and not as a string, gets such lists."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    template = environment.from_string(source)

    def with_parts(variables: dict[str, Any]) -> str:
        messages = [m | {"content": [{"type": "text", "text": m["content"] or ""}]} for m in variables["messages"]]
        return template.render(variables | {"messages": messages})

    trial = {"messages": [_USER | {"content": _MARK}], "tools": None, "bos_token": "", "eos_token": ""}
    if "text" in source and _MARK not in _trial(template.render, trial) and _MARK in _trial(with_parts, trial):
        return with_parts
    return template.render


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes HTML, which no model has seen."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
