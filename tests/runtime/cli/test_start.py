"""Ctrl-C while a tool starts. It comes from within: from a module that every command imports."""

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from documents import ROOT

SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
FAKE_CLICK = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit('went on')\n"


def started(place: str, folder: Path) -> "subprocess.CompletedProcess[bytes]":
    module, _, function = place.partition(":")
    (folder / "click.py").write_text(FAKE_CLICK)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    code = f"from {module} import {function}; {function}()"
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, timeout=240
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_ctrl_c_while_modules_are_imported(name: str, tmp_path: Path) -> None:
    done = started(SCRIPTS[name], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_ctrl_c_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As of a command that a shell has put into the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        done = started(SCRIPTS["gguf-run"], tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.returncode, done.stderr) == (1, b"went on\n")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_run_the_command_of_their_name(name: str) -> None:
    module, _, function = SCRIPTS[name].partition(":")
    code = f"import sys; from {module} import {function}; sys.argv = ['{name}', '--version']; {function}()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout.startswith(f"{name}, version ")) == (0, True), done.stderr
