"""JSON for a terminal."""

import json
from typing import Any


def json_text(value: Any) -> str:
    """Return JSON that is safe to show: characters that steer a terminal or turn the direction of text are escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
