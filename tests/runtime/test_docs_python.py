"""What the documents show of the Python API runs, as it stands there but for shorter answers."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import real

ROOT = Path(__file__).parents[2]


def examples(text: str) -> Iterator[tuple[str, str | None]]:
    """Python blocks, each with the `text` block right behind it: what it prints."""
    for match in re.finditer(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", text, re.DOTALL):
        yield match[1], match[2]


def test_examples_are_found() -> None:
    text = "a\n```python\nprint(1)\n```\n\n```text\n1\n```\n```\nno\n```\n```py\nno\n```\n```python\nx\n```\n\nb"
    assert [*examples(text)] == [("print(1)\n", "1\n"), ("x\n", None)]


@pytest.mark.parametrize("document", ["docs/python.md", "docs/quick_start.md", "README.md"])
def test_examples_run(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.gguf").symlink_to(real.smollm2())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    found = [*examples((ROOT / document).read_text())]
    assert found
    for i, (code, expected) in enumerate(found):
        code = re.sub(r"max_tokens=\d\d", "max_tokens=5", code)
        exec(compile(code, f"{document}, python block {i + 1}", "exec"), names)
        printed = capsys.readouterr().out
        assert expected is None or printed == expected
    if document == "docs/python.md":
        assert names["model"].__repr__() == "<Model, closed>"
