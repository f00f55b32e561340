"""Completion in bash, zsh and fish: click's, which knows the options, with what their values may be.

Imported only while a shell asks. `gguf-run --completion SHELL` prints what makes it ask.
"""

import os
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, get_completion_class

SHELLS = ("bash", "zsh", "fish")


def completion_script(shell: str) -> str:
    """Return the lines that a shell must read to complete all of our commands."""
    kind = get_completion_class(shell)
    assert kind is not None
    names = [script.name for script in distribution("gguf-run").entry_points if script.group == "console_scripts"]
    scripts = [kind(click.Command(name), {}, name, f"_{name}_COMPLETE".replace("-", "_").upper()) for name in names]
    return "\n".join(script.source_template % script.source_vars() for script in scripts)


def prepare(command: click.Command) -> None:
    """Let the parameters of a command, and of its subcommands, know their values."""
    add_completion_class(_Bash, "bash")
    for member in [command, *(command.commands.values() if isinstance(command, click.Group) else ())]:
        for parameter in member.params:
            values = _VALUES.get(parameter.name or "") or (_files if parameter.metavar == "FILE" else None)
            if values is not None and not getattr(parameter, "is_flag", False):
                parameter.type = _Completed(values)


class _Completed(click.ParamType):
    """A parameter with values that can be completed. values: from what is typed to all that could be meant."""

    name = "text"

    def __init__(self, values: Callable[[str], Iterable[str]]) -> None:
        self.values = values

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",") if getattr(param, "multiple", False) else ("", "", incomplete)
        found = [value for value in self.values(last) if value.lower().startswith(last.lower())]
        return [CompletionItem(before + comma + value) for value in found] or [CompletionItem(incomplete, type="file")]


class _Bash(BashComplete):
    """bash takes a colon for the end of a word: the parts of hf:owner/repo:TYPE are put together, and completed from
    the last colon on."""

    def get_completion_args(self) -> tuple[list[str], str]:
        n_words = int(os.environ["COMP_CWORD"])
        words = click.shell_completion.split_arg_string(os.environ["COMP_WORDS"])
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


def _models(typed: str) -> list[str]:
    """Cached models, GGUF files, and folders. Folders alone: the shell completes them better."""
    from gguf_run.runtime.hub.listing import cached_models

    names = [model.name for model in cached_models() if model.name]
    folder, _, _ = typed.rpartition("/")
    found = sorted(Path(folder or ("/" if typed.startswith("/") else ".")).glob("*"))
    at = f"{folder}/" if "/" in typed else ""
    names += [f"{at}{path.name}" for path in found if path.name.endswith(".gguf")]
    folders = [f"{at}{path.name}/" for path in found if path.is_dir() and not path.name.startswith(".")]
    return names + folders if any(name.lower().startswith(typed.lower()) for name in names) else []


def _types(typed: str) -> list[str]:
    from gguf_run.runtime.quantize.file_types import WRITABLE_FILES

    return [*WRITABLE_FILES]


def _tensor_types(typed: str) -> tuple[str, ...]:
    from gguf_run.runtime.quantize.file_types import WRITABLE

    return WRITABLE


def _cache_types(typed: str) -> list[str]:
    from gguf_run.kernels_cpu.attention.cache_types import CACHE_FORMATS

    return [*CACHE_FORMATS]


def _samplers(typed: str) -> list[str]:
    from gguf_run.runtime.sampling.params import SAMPLERS

    before, sign, _ = typed.rpartition(";")
    return [f"{before}{sign}{name}" for name in SAMPLERS]


def _templates(typed: str) -> list[str]:
    from gguf_run.runtime.chat.named import TEMPLATES

    return [*TEMPLATES]


def _files(typed: str) -> list[str]:
    return []


def _words(words: str, typed: str) -> list[str]:
    return words.split()


_VALUES: dict[str, Callable[[str], Iterable[str]]] = {
    **dict.fromkeys(("model", "models", "diff", "base"), _models),
    **dict.fromkeys(("cache_type", "cache_type_k", "cache_type_v", "types"), _cache_types),
    **dict.fromkeys(("quantize", "rest"), _types),
    "kind": lambda typed: ["auto", *_types(typed)],
    **dict.fromkeys(("output_tensor_type", "token_embedding_type"), _tensor_types),
    **dict.fromkeys(("file", "in_file", "path"), _files),
    "device": partial(_words, "auto cpu cuda cuda:0"),
    "gpu_layers": partial(_words, "auto all"),
    "samplers": _samplers,
    "chat_template": _templates,
}
