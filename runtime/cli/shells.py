"""Completion in bash, zsh and fish: what makes a shell ask us, and how bash's words are put together.

Imported only where a shell asks. complete.py says what the values of parameters may be.
"""

import os
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
