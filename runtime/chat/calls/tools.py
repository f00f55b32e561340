"""The tools that a model may call, and values of their arguments that are not written as JSON."""

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

_NAMES = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}
_NOTHING = {"properties": {}, "additionalProperties": False}  # the arguments of a tool that has none


def schemas(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    """Return the JSON schema of the arguments of each tool by its name. tools: as in OpenAI's API."""
    functions = [tool.get("function", tool) for tool in tools or ()]
    return {one["name"]: {"type": "object"} | (field(one, "parameters", dict) or _NOTHING) for one in functions}


def told(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages that tell of tools and of the generic form of calls: for templates without a place for tools."""
    functions = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    call = '{"name": the name of the function, "arguments": {...}}'
    text = f"You can call these functions:\n{functions}\nTo call one, answer with nothing but a JSON object: {call}"
    first, *rest = [dict(message) for message in messages]
    if first.get("role") in ("system", "developer") and isinstance(first.get("content"), str):
        return [first | {"content": f"{first['content']}\n\n{text}"}, *rest]
    return [{"role": "system", "content": text}, first, *rest]


def field(schema: Any, name: str, kind: type) -> Any:
    """Return a field of a schema; an empty value of a kind if it has another one: a schema may hold anything."""
    value = schema.get(name) if isinstance(schema, dict) else None
    return value if isinstance(value, kind) else kind()


def choices(schema: Any) -> list[Any]:
    """Return the values of an enum or a const, [] for other schemas."""
    return [schema["const"]] if isinstance(schema, dict) and "const" in schema else field(schema, "enum", list)


def types_of(schema: Any) -> set[str]:
    """Return the JSON types that a schema names, with those of its alternatives; empty if it allows any."""
    found = {one for one in [field(schema, "type", str), *field(schema, "type", list)] if one and isinstance(one, str)}
    found.update(map(_type, choices(schema)))
    return found.union(*(types_of(one) for name in ("anyOf", "oneOf") for one in field(schema, name, list)))


def value_json(text: str, types: set[str]) -> str:
    """Return the JSON of a value that a model has written as plain text. types: what its schema allows, see types_of.

    What is JSON or a literal of Python of an allowed type counts as such. Everything else is a string.
    """
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text.strip())
            written = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        kind = _type(value)
        if kind != "string" and (not types or kind in types or (kind == "integer" and "number" in types)):
            return written
    return json.dumps(text, ensure_ascii=False)


def _type(value: Any) -> str:
    return "null" if value is None else _NAMES.get(type(value), "array")
