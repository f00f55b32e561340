"""What to say of an architecture that is not known: the one whose tensors come nearest, and how the file differs."""

import re
from collections.abc import Callable, Collection

from gguf_run.formats.errors import GgufRunError
from gguf_run.models.architectures import Architecture, entries
from gguf_run.models.keys import show
from gguf_run.models.tensor_check import TOWERS

_MOST = 4  # names that are shown


def nearest(
    tensors_of: Callable[[Architecture], tuple[Collection[str], Collection[str]]], tensors: Collection[str]
) -> str:
    """Return a sentence about the architecture that comes nearest to a file of an unknown one.

    tensors_of: returns the names of the tensors that the file must have, and may have, as a file of an architecture;
    raises GgufRunError if it can be none. tensors: the names of those that it has.
    """
    found = []
    for arch in entries():
        try:
            required, optional = tensors_of(arch)
        except GgufRunError:
            continue
        more, fewer = (
            dict.fromkeys(re.sub(r"^blk\.\d+\.", "", name) for name in names)
            for names in (
                [n for n in tensors if n not in required and n not in optional and not n.startswith(TOWERS)],
                [name for name in required if name not in tensors],
            )
        )
        found.append((len(more) + len(fewer), arch.name, _shown(more), _shown(fewer)))
    if not found:
        return "README.md lists those that this program runs"
    _, name, has, lacks = min(found, key=lambda row: row[0])
    parts = [f"{words} {names}" for words, names in (("has also", has), ("lacks", lacks)) if names]
    differs = " and ".join(parts) if parts else "has the same tensors, but what it computes from them is not known"
    return f"the nearest that this program runs is {name}: the file {differs}"


def _shown(names: Collection[str]) -> str:
    return ", ".join(map(show, list(names)[:_MOST])) + (f" and {len(names) - _MOST} more" if len(names) > _MOST else "")
