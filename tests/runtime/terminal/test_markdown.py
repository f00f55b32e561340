"""Markdown on a terminal: what is shown when, and that nothing is lost."""

import re

import pytest

from gguf_run.runtime.terminal.reasoning import DIM, PLAIN

pytest.importorskip("rich")
from gguf_run.runtime.terminal.markdown import rendered

TEXT = """# Fruit

Some **ripe** ones:

1. *Apples*
   - red
2. Pears

```python
def f():

    return 1
```
| a | b |
|---|---|
| 1 | 2 |

The end"""


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


@pytest.mark.parametrize("n", [1, 7, 1000])
def test_all_is_shown_once(n: int) -> None:
    shown = "".join(rendered(TEXT[i : i + n] for i in range(0, len(TEXT), n)))
    words = ["Fruit", "Some ripe ones:", "1 Apples", "red", "2 Pears", "def f():", "return 1", "The end"]
    assert re.sub(r"\s+", " ", plain(shown)).count("Apples") == 1
    at = [re.sub(r"[\s\u2022]+", " ", plain(shown)).index(word) for word in words]
    assert at == sorted(at)
    assert "**" not in shown
    assert "\x1b[1mripe" in shown
    assert max(map(len, plain(shown).splitlines())) <= 40


def test_a_block_is_shown_when_it_is_whole() -> None:
    coming = rendered(
        iter(["One **par", "agraph**\n\n", "- an item\n", "- another\n", "```\n", "a\n", "\n```\n", "end"])
    )
    shown = [plain(text) for text in coming if text]
    assert [re.sub(r"\s+", " ", text).strip() for text in shown] == [
        "One paragraph", "\u2022 an item", "\u2022 another", "a", "end",
    ]  # fmt: skip


def test_thoughts_stay_as_they_are() -> None:
    shown = "".join(rendered([DIM, "so **much", "** to think\nabout", PLAIN, "\n\n**Yes**"]))
    assert shown.startswith(f"{DIM}so **much** to think\nabout{PLAIN}\n\n")
    assert plain(shown).endswith("\nYes")
