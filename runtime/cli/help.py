"""What helps at the command line: the text of `--help`, and completion in bash, zsh and fish.

This file is imported only when a user or a shell asks. complete.py says what the values of parameters may be.
The text of `--help` is as wide as the terminal or as COLUMNS says, at most 100 columns. In a pipe it has 80.
"""

import os
import shutil
from collections.abc import Sequence
from importlib.metadata import distribution
from typing import Any

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

from gguf_run.runtime.cli.options import CACHE_OPTIONS, DEVICE_OPTIONS, SAMPLING_OPTIONS
from gguf_run.runtime.terminal.text import has_colours

MOST_COLUMNS = 100
# Titles of groups, and the names of the parameters in them. All other options stand in the first group.
GROUPS: tuple[tuple[str, Sequence[str | None]], ...] = (
    ("Options", ()),
    ("Who may ask", ["host", "port", "api_key", "api_key_file", "allowed_host", "cors_origin", "tls_cert", "tls_key"]),
    ("Several models", ["models_dir", "alias", "max_models", "keep_alive", "lora"]),
    ("Sampling", [option.name for option in SAMPLING_OPTIONS]),
    ("Context", ["context_shift", "n_keep", "session", *(option.name for option in CACHE_OPTIONS)]),
    ("What runs where", [*(option.name for option in DEVICE_OPTIONS), "gpu_memory"]),
    ("Change metadata", ["assignments", "remove", "in_place"]),
)
EXIT_CODES = (
    ("0", "all went well"),
    ("1", "an error: one line on stderr says which"),
    ("2", "wrong usage, or an option's value that is not allowed"),
    ("130", "interrupted with Ctrl-C"),
    ("141", "the reader of the output went away, as in `| head`"),
)
ENVIRONMENT = (
    ("XDG_CACHE_HOME", "folder of gguf-run/, which holds compiled kernels and downloaded models [default: ~/.cache]"),
    ("HF_TOKEN", "token for models on the Hugging Face hub; HF_HOME, HF_HUB_CACHE and HF_ENDPOINT work too"),
    ("NO_COLOR", "if set, no colours; there are none in a pipe either"),
    ("COLUMNS", "the width of this text"),
)


class _Formatter(click.HelpFormatter):
    def write_heading(self, heading: str) -> None:
        super().write_heading(click.style(heading, bold=True) if has_colours() else heading)


def help_text(command: click.Command, context: click.Context) -> str:
    """Return all that --help shows of a command."""
    formatter = _Formatter(width=max(40, min(shutil.get_terminal_size().columns, MOST_COLUMNS) - 2))
    command.format_usage(context, formatter)
    command.format_help_text(context, formatter)
    if isinstance(command, click.Group):
        command.format_commands(context, formatter)
    options = [option for option in command.get_params(context) if isinstance(option, click.Option)]
    titles = {name: title for title, names in GROUPS for name in names}
    for title, _ in GROUPS:
        members = [option for option in options if titles.get(option.name, "Options") == title]
        if records := [row for option in members if (row := option.get_help_record(context))]:
            with formatter.section(title):
                formatter.write_dl(records)
    if examples := getattr(command, "examples", ()):
        with formatter.section("Examples"):
            formatter.write("".join(f"{'':>{formatter.current_indent}}{line}\n" for line in examples))
    for title, rows in (("Exit codes", EXIT_CODES), ("Environment", ENVIRONMENT)):
        with formatter.section(title):
            formatter.write_dl(rows)
    return formatter.getvalue().rstrip("\n")


def completion_script(shell: str) -> str:
    """Return the lines that a shell must read to complete all of our commands."""
    kind = get_completion_class(shell)
    assert kind is not None
    names = [script.name for script in distribution("gguf-run").entry_points if script.group == "console_scripts"]
    scripts = [kind(click.Command(name), {}, name, f"_{name}_COMPLETE".replace("-", "_").upper()) for name in names]
    return "\n".join(script.source_template % script.source_vars() for script in scripts)


def complete_in_bash() -> None:
    """Make click use _Bash when bash asks."""
    add_completion_class(_Bash, "bash")


class _Bash(BashComplete):
    """Completes hf:owner/repo:TYPE although bash ends a word at a colon.

    The words around colons are joined, and a value is offered without its part up to the last typed colon.
    """

    def get_completion_args(self) -> tuple[list[str], str]:
        n_words = int(os.environ["COMP_CWORD"])
        words = split_arg_string(os.environ["COMP_WORDS"])
        joined: list[str] = []
        for word in words[1 : n_words + 1]:
            if joined and (word == ":" or joined[-1].endswith(":")):
                joined[-1] += word
            else:
                joined.append(word)
        incomplete = joined.pop() if len(words) > n_words and joined else ""
        return joined, incomplete

    def format_completion(self, item: CompletionItem[Any]) -> str:
        _, incomplete = self.get_completion_args()
        value = item.value[incomplete.rfind(":") + 1 :] if item.type == "plain" else item.value
        return f"{item.type},{value}"
