"""A recipe: the type of each tensor, as llama-quantize --tensor-type-file reads it: words of the form REGEX=TYPE."""

import re
from collections.abc import Sequence
from pathlib import Path

from gguf_run.formats.atomic import replacing
from gguf_run.formats.blocks.types import TensorType
from gguf_run.formats.errors import OptionError
from gguf_run.formats.gguf.mapped import read_bytes
from gguf_run.runtime.quantize.file_types import writable_type
from gguf_run.runtime.quantize.item import Item

_LARGEST_FILE = 64 << 20
Rule = tuple[re.Pattern[str], TensorType]  # the tensors in whose names the pattern is found, and their type


def rule(text: str, option: str) -> Rule:
    """Return what a text such as "attn_v=Q6_K" says. OptionError, which begins with `option`, if it says nothing."""
    pattern, equals, name = text.rpartition("=")
    try:
        if pattern and equals:
            return re.compile(pattern, re.IGNORECASE), writable_type(name, f"{option} {text}")
    except re.error as error:
        raise OptionError(f'{option} {text}: "{pattern}" is not a regular expression: {error}') from None
    raise OptionError(f"{option} {text}: must be REGEX=TYPE, as attn_v=Q6_K")


def read_recipe(path: Path) -> list[Rule]:
    """Read a recipe. OptionError for a word that is no rule; OSError if the file cannot be read."""
    return [rule(word, f"{path}:") for word in read_bytes(path, _LARGEST_FILE).decode(errors="replace").split()]


def write_recipe(path: Path, items: Sequence[Item]) -> None:
    """Write the types of the quantized tensors, one a line. OSError if the file cannot be written."""
    types = {item.target.name: item.target.type.name for item in items if item.target.type.is_quantized}
    lines = [f"^{re.escape(name)}$={type}\n" for name, type in types.items()]
    with replacing(path) as temporary:
        temporary.write_text("".join(lines))
