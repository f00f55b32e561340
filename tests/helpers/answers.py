"""Answers with calls of tools: the tools, and what splitters make of texts."""

import json
from collections.abc import Iterable
from typing import Any

from gguf_run.runtime.chat.answer_parts import Part
from gguf_run.runtime.chat.calls.family import Family
from gguf_run.runtime.chat.calls.form import FORMS, GENERIC, Form

WEATHER = {"type": "object", "required": ["city"], "additionalProperties": False,
           "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}}}  # fmt: skip
ADD = {"type": "object", "required": ["b", "a"], "additionalProperties": False, "properties": {
    "a": {"type": "integer", "minimum": 0, "maximum": 99},
    "b": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 2},
    "c": {"type": ["boolean", "null"]},
    "d": {"type": "object", "properties": {"k": {"type": ["null", "number"]}}, "additionalProperties": False},
}}  # fmt: skip
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "description": "Tells it.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "add-x", "description": "Adds.", "parameters": ADD}},
    {"type": "function", "function": {"name": "now", "description": "Tells the time."}},
]
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("get_weather", {"city": "Zürich"}),
    ("add-x", {"a": 1, "b": ["x", 'y\n"{'], "c": True, "d": {"k": None}}),
]


def joined(parts: Iterable[Part]) -> list[tuple[str, str]]:
    """Parts in a row of one kind as one."""
    found: list[tuple[str, str]] = []
    for kind, text in parts:
        if found and found[-1][0] == kind != "call":
            text = found.pop()[1] + text
        found.append((kind, text))
    return found


def split(form: Form, pieces: Iterable[str], prompt: str = "", tools: Any = TOOLS, whole: bool = True) -> Any:
    splitter = Family(form).splitter(prompt, tools)
    parts = [part for piece in pieces for part in splitter.push(piece)]
    return joined(parts + splitter.end() if whole else parts)


def form(name: str) -> Form:
    return next(one for one in (*FORMS, GENERIC) if one.name == name)


def calls_of(parts: list[tuple[str, str]]) -> list[tuple[str, Any]]:
    arguments = [json.loads(text) for kind, text in parts if kind == "arguments"]
    return list(zip((text for kind, text in parts if kind == "call"), arguments, strict=True))
