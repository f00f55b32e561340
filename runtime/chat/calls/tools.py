"""The tools that a model may call, and values of their arguments that are not written as JSON."""

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

NO_PARAMETERS = {"type": "object", "properties": {}}


def schemas(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """Return the JSON schema of the arguments of each tool by its name. tools: as in OpenAI's API."""
    functions = [tool.get("function", tool) for tool in tools or ()]
    return {function["name"]: function.get("parameters") or NO_PARAMETERS for function in functions}


def types_of(schema: Any) -> set[str]:
    """Return the JSON types that a schema names, with those of its alternatives; empty if it allows any."""
    if not isinstance(schema, dict):
        return set()
    kinds = schema.get("type", [])
    found = set([kinds] if isinstance(kinds, str) else kinds)
    for value in [schema["const"]] if "const" in schema else schema.get("enum", []):
        found.add(_type(value))
    for part in [*schema.get("anyOf", []), *schema.get("oneOf", [])]:
        found |= types_of(part)
    return found


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
            return text.strip() if read is json.loads else written
    return json.dumps(text, ensure_ascii=False)


def in_string(text: str) -> str:
    """Return text as it stands between the quotes of a string of JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _type(value: Any) -> str:
    for kind, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (dict, "object")):
        if isinstance(value, kind):
            return name
    return "null" if value is None else "array"
