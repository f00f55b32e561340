"""The table of architectures: each module has some entries. A name is looked up in one module after the other."""

from collections.abc import Iterator
from importlib import import_module

from gguf_run.models.architectures import Architecture

_MODULES = ("dense", "gemma", "mixtures")


def entries() -> Iterator[Architecture]:
    """Yield all architectures. A module is imported when its entries are reached."""
    for module in _MODULES:
        yield from import_module(f"{__name__}.{module}").ENTRIES


def architecture(name: str) -> Architecture:
    """Return the architecture of a name as in `general.architecture`. Raises KeyError for a name that is not known."""
    for entry in entries():
        if entry.name == name:
            return entry
    raise KeyError(name)
