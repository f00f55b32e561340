"""Metadata values as gguf-info shows them: of long arrays and texts the beginning."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gguf_run.formats.gguf.metadata import Typed
from gguf_run.formats.gguf.strings import StringArray
from gguf_run.runtime.terminal.text import one_line

# Of an array, this many items are shown; of a text, this many characters (in the table only, JSON has all of it).
SHOWN_ITEMS = 8
SHOWN_CHARACTERS = 90


def describe_value(value: Any, start: int = 0) -> dict[str, Any]:
    """Return the value as JSON shows it: of an array the length and the items from `start`."""
    if isinstance(value, np.ndarray | StringArray | list):
        items = value[start : start + SHOWN_ITEMS]
        shown = items.tolist() if isinstance(items, np.ndarray) else items
        return {"length": len(value)} | ({"from": start} if start else {}) | {"value": [_plain(item) for item in shown]}
    return {"value": _plain(value)}


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: no infinities, nested arrays by their length."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Typed):
        value = value.value
    return f"array of {len(value)}" if isinstance(value, np.ndarray | StringArray | list) else value


def show_value(entry: Mapping[str, Any]) -> str:
    """A metadata value on one line that is not too long."""
    if "length" in entry:
        text = ", ".join(_item(item, entry["type"]) for item in entry["value"])
    else:
        value = entry["value"]
        text = value if isinstance(value, str) else _item(value, entry["type"])
    start, length = entry.get("from", 0), entry.get("length", 0)
    more = ", ..." if length > start + SHOWN_ITEMS else ""
    if len(text) > SHOWN_CHARACTERS:
        text, more = text[:SHOWN_CHARACTERS], "..."
    place = f"[{length}] " + (f"from {start}: " if start else "") if "length" in entry else ""
    return one_line(f"{place}{text}{more}")


def _item(value: Any, type: str) -> str:
    """A value as JSON, an f32 with as many digits as it has."""
    if "f32" in type and isinstance(value, float):
        return str(np.float32(value))
    return json.dumps(value, ensure_ascii=False)
