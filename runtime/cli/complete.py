"""What the values of parameters may be, for completion in shells: each function is a parameter's shell_complete=."""

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Complete: TypeAlias = "Callable[[click.Context, click.Parameter, str], list[CompletionItem]]"


def among(values: Callable[[str], Iterable[str]]) -> Complete:
    """Return a shell_complete= that offers the values that begin with the typed text, or files if there are none.

    values: called with the typed text.
    The last part of a list with commas is completed where the option may be repeated.
    """

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        from click.shell_completion import CompletionItem

        is_list = getattr(param, "multiple", False)
        before, comma, typed = incomplete.rpartition(",") if is_list else ("", "", incomplete)
        found = [value for value in values(typed) if value.lower().startswith(typed.lower())]
        items: list[CompletionItem] = [CompletionItem(before + comma + value) for value in found]
        return items or [CompletionItem(incomplete, type="file")]

    return complete


def words(text: str) -> Complete:
    """Return a shell_complete= that offers the words of a text."""
    return among(lambda typed: text.split())


files = words("")
devices = words("auto cpu cuda cuda:0")
layers = words("auto all")


@among
def models(typed: str) -> list[str]:
    """Return cached models, GGUF files and folders. If only folders fit, the shell does it better: return nothing."""
    from gguf_run.runtime.hub.listing import cached_models

    names = [model.name for model in cached_models() if model.name]
    folder, _, _ = typed.rpartition("/")
    found = sorted(Path(folder or ("/" if typed.startswith("/") else ".")).glob("*"))
    at = f"{folder}/" if "/" in typed else ""
    names += [f"{at}{path.name}" for path in found if path.name.endswith(".gguf")]
    folders = [f"{at}{path.name}/" for path in found if path.is_dir() and not path.name.startswith(".")]
    return names + folders if any(name.lower().startswith(typed.lower()) for name in names) else []


def names(module: str, table: str) -> Complete:
    """Return a shell_complete= that offers the names in a table of a module, which is imported when a shell asks."""
    return among(lambda typed: getattr(import_module(f"gguf_run.{module}"), table))


file_types = names("runtime.quantize.file_types", "WRITABLE_FILES")
loadable_types = names("runtime.quantize.file_types", "LOADABLE")
cache_types = names("kernels_cpu.attention.cache_types", "CACHE_FORMATS")
chat_templates = names("runtime.chat.named", "TEMPLATES")


@among
def samplers(typed: str) -> list[str]:
    """Return what is typed, with each name of a sampler behind its last semicolon."""
    from gguf_run.runtime.sampling.params import SAMPLERS

    before, sign, _ = typed.rpartition(";")
    return [f"{before}{sign}{name}" for name in SAMPLERS]
