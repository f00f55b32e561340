"""Reads what the documents and pyproject.toml say about the commands."""

import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]


PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


DOCUMENTS = (
    *sorted(path.name for path in ROOT.glob("*.md")),
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)
SCRIPTS: dict[str, str] = PYPROJECT["project"]["scripts"]


def commands_in(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (script, options) for each line in code blocks and inline code that calls one of our scripts.

    A script with subcommands is named with the called one: "gguf-eval kl".
    """
    code = re.findall(r"```\w*\n(.*?)```|`([^`\n]+)`", text, re.DOTALL)
    for line in (line for block in code for line in "".join(block).replace("\\\n", " ").splitlines()):
        line = re.sub(r"\"[^\"]*\"|'[^']*'|#.*", "", line)
        for part in re.split(r"[|;&]", line):
            if match := re.search(r"(?:^|[\s/])(gguf-\w+)((?:\s.*)?)$", part):
                name = match[1]
                command, words = command_of(name), match[2].split()
                if words and (isinstance(command, click.Group) or words[0] in getattr(command, "commands", {})):
                    name = f"{name} {words[0]}"
                yield name, re.findall(r"(?<=[\s[])--?[a-z][\w-]*", match[2])


def command_of(script: str) -> click.Command:
    """The click command of "gguf-run", or of "gguf-eval kl". KeyError if there is none."""
    script, _, subcommand = script.partition(" ")
    _, _, name = SCRIPTS[script].partition(":")  # runtime/cli/start.py calls the module of its function's name
    command = importlib.import_module(f"gguf_run.runtime.cli.{name}").main
    return command.commands[subcommand] if subcommand else command


def options_of(script: str) -> set[str]:
    command = command_of(script)
    return {"--help", *(name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts))}
