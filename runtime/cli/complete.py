"""What the values of parameters may be, for completion in shells: each function is a parameter's shell_complete=."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Complete: TypeAlias = "Callable[[click.Context, click.Parameter, str], list[CompletionItem]]"


def among(values: Callable[[str], Iterable[str]]) -> Complete:
    """Return a shell_complete= that offers those of values(what is typed) that begin so, or files if there are none.

    Of an option that may be repeated, values with commas between them are completed one by one.
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


@among
def models(typed: str) -> list[str]:
    """Cached models, GGUF files, and folders. Folders alone: the shell completes them better."""
    from gguf_run.runtime.hub.listing import cached_models

    names = [model.name for model in cached_models() if model.name]
    folder, _, _ = typed.rpartition("/")
    found = sorted(Path(folder or ("/" if typed.startswith("/") else ".")).glob("*"))
    at = f"{folder}/" if "/" in typed else ""
    names += [f"{at}{path.name}" for path in found if path.name.endswith(".gguf")]
    folders = [f"{at}{path.name}/" for path in found if path.is_dir() and not path.name.startswith(".")]
    return names + folders if any(name.lower().startswith(typed.lower()) for name in names) else []


@among
def file_types(typed: str) -> list[str]:
    """What gguf-quantize can write."""
    from gguf_run.runtime.quantize.rules import FILE_TYPES

    return [*FILE_TYPES]


@among
def tensor_types(typed: str) -> Iterable[str]:
    """What a single tensor can become."""
    from gguf_run.runtime.quantize.rules import WRITABLE

    return WRITABLE


@among
def cache_types(typed: str) -> list[str]:
    """Types of the KV cache."""
    from gguf_run.kernels_cpu.attention.cache_types import CACHE_FORMATS

    return [*CACHE_FORMATS]


@among
def samplers(typed: str) -> list[str]:
    """Names of samplers, with semicolons between them."""
    from gguf_run.runtime.sampling.params import SAMPLERS

    before, sign, _ = typed.rpartition(";")
    return [f"{before}{sign}{name}" for name in SAMPLERS]


@among
def chat_templates(typed: str) -> list[str]:
    """The chat templates that have a name."""
    from gguf_run.runtime.chat.named import TEMPLATES

    return [*TEMPLATES]
