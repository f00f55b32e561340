"""Messages in one form, whichever form a caller gives them in. Errors name the place, as messages[2].content."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from gguf_run.formats.errors import GgufRunError

_TEXTS = ("role", "name", "tool_call_id", "reasoning_content")  # fields of a message that hold a string
_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # type -> its field
# Types of parts that results of tools may have, though they are no text.
_UNSEEN = ("image", "image_url", "input_image", "document", "file", "input_file", "input_audio")
_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}


def uniform(messages: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return copies of messages in the form that chat templates are written for.

    messages: {"role": ..., "content": ...} each, as in OpenAI's API; or a string, which is the message of a user.

    Content becomes a string: "" where it is null or missing, and text parts are joined by line breaks as in llama.cpp.
    In the result of a tool, a note stands for an image or a file: agents show them to the model, and go on.
    The arguments of a tool call become an object if they are a string of one, in JSON; any other string stays as it is,
    since models write such. Other fields that are null are left out.
    A refusal is a text, too. function_call and the role "function" (OpenAI, before tools) become a call and "tool".
    GgufRunError names the place where anything else is found.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return [_message(message, f"messages[{i}]") for i, message in enumerate(objects(messages, "messages"))]


def objects(value: Any, place: str) -> list[dict[str, Any]]:
    """Return a list of objects as plain JSON. GgufRunError names the place where anything else is found."""
    found = _typed(plain(value, place), list, place, "a list of objects")
    return [_typed(item, dict, f"{place}[{i}]", "an object") for i, item in enumerate(found)]


def plain(value: Any, place: str) -> Any:
    """Return a copy of a value that has JSON's types only. GgufRunError names the place of anything else."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        names = [_typed(name, str, f"a name in {place}", "a string") for name in value]
        return {name: plain(value[name], f"{place}.{name}") for name in names}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [plain(item, f"{place}[{i}]") for i, item in enumerate(value)]
    return _typed(value, type(None), place, "what JSON can hold: objects, lists, strings, numbers, booleans, null")


def _message(message: dict[str, Any], place: str) -> dict[str, Any]:
    fields = {name: value for name, value in message.items() if value is not None}
    for name in _TEXTS:
        _typed(fields.get(name, "" if name != "role" else None), str, f"{place}.{name}", "a string")
    if fields["role"] == "function":
        fields["role"] = "tool"
    refusal = _typed(fields.pop("refusal", ""), str, f"{place}.refusal", "a string")
    is_result = fields["role"] == "tool"
    fields["content"] = _text(fields.get("content", ""), f"{place}.content", is_result) or refusal
    calls = _typed(fields.pop("tool_calls", []), list, f"{place}.tool_calls", "a list")
    if "function_call" in fields:
        call = fields.pop("function_call")
        calls = [*calls, {"function": _typed(call, dict, f"{place}.function_call", "an object")}]
    if calls:
        fields["tool_calls"] = [_call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return fields


def _text(content: Any, place: str, is_result: bool) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(_typed(content, list, place, 'a string, or a list of {"type": "text", "text": ...}')):
        here = f"{place}[{i}]"
        kind = _typed(part, dict, here, 'an object, as {"type": "text", "text": ...}').get("type")
        if is_result and kind in _UNSEEN:
            texts.append(f"[{kind} left out: you read nothing but text]")
            continue
        if not isinstance(kind, str) or kind not in _PARTS:
            raise GgufRunError(f'{here}.type is {json.dumps(kind)[:40]}; allowed: "text", the model reads nothing else')
        texts.append(_typed(part.get(_PARTS[kind]), str, f"{here}.{_PARTS[kind]}", "a string"))
    return "\n".join(texts)


def _call(call: Any, place: str) -> dict[str, Any]:
    form = 'an object, as {"function": {"name": ..., "arguments": {...}}}'
    function = _typed(_typed(call, dict, place, form).get("function"), dict, f"{place}.function", form)
    _typed(function.get("name"), str, f"{place}.function.name", "a string")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(arguments or "null")
            arguments = arguments if value is not None and not isinstance(value, dict) else value
    if not isinstance(arguments, str):
        what = "an object, as a string of JSON too"
        arguments = _typed({} if arguments is None else arguments, dict, f"{place}.function.arguments", what)
    fields = {name: value for name, value in call.items() if value is not None}
    return {"type": "function", **fields, "function": {**function, "arguments": arguments}}


def _typed(value: Any, kind: type, place: str, allowed: str) -> Any:
    """Return a value of the type `kind`. GgufRunError: it is of another type."""
    if isinstance(value, kind):
        return value
    found = "missing" if value is None else _KINDS.get(type(value), f"of Python's type {type(value).__name__}")
    raise GgufRunError(f"{' '.join(place.split())[-200:]} is {found}; allowed: {allowed}")
