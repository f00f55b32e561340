import warnings

import click
from click.testing import CliRunner

from gguf_run.runtime.cli.common import Command, Group, tool


def test_programmers_warnings_are_hidden() -> None:
    @click.command(cls=Command)
    def warn() -> None:
        warnings.warn("of interest", stacklevel=1)
        warnings.warn("of no interest", DeprecationWarning, stacklevel=1)

    assert CliRunner().invoke(warn).stderr == "warning: of interest\n"


def test_tool_and_subcommands() -> None:
    """Each has -h and one line for an error; a tool has --version too."""

    @tool("gguf-x", Group, examples=["gguf-x fail"])
    def main() -> None:
        pass

    @main.command("fail", examples=["gguf-x fail --now"])
    def fail() -> None:
        raise MemoryError

    run = CliRunner().invoke
    assert run(main, ["--version"]).output.startswith("gguf-x, version ")
    assert "Examples:\n  gguf-x fail --now\n" in run(main, ["fail", "-h"]).output
    assert run(main, ["fail"]).stderr.startswith("error: out of memory: ")
