"""The programs of examples/ run, each in a process of its own, and print what they are about."""

import os
import subprocess
import sys

import pytest
import real
from documents import ROOT

EXPECTED = {
    "batch": "The word lantern means",
    "block_formats": "IQ4_XS",
    "chat": "tokens of the prompt were known",
    "surprise": "perplexity",
    "yes_or_no": "Is Paris in France? ",
}


def test_every_example_is_tested() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_example_runs(name: str) -> None:
    arguments = [] if name == "block_formats" else [str(real.smollm2())]
    done = subprocess.run(
        [sys.executable, str(ROOT / f"examples/{name}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    assert EXPECTED[name] in done.stdout
