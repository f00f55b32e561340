import json

from gguf_run.runtime.terminal.json_text import json_text


def test_json_text() -> None:
    """Whatever steers a terminal or turns the direction of text is escaped; letters of any script are not."""
    facts = {"a\x9b31m": ["é漢🦙 b", "\x1b[2J\x7f\x00\n", "\u202e\u2066\u200f\u2028\U000e0041"], "b": 1.5}
    text = json_text(facts)
    assert json.loads(text) == facts
    assert "é漢🦙 b" in text
    assert all(c.isprintable() for c in text.replace("\n", ""))
