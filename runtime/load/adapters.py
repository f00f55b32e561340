"""Opens the adapters that LoadOptions.lora names, for a model that is about to be loaded."""

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import TypeAlias

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.models.adapted_step import Adapters
from gguf_run.models.adapters import read_adapter

Named: TypeAlias = str | os.PathLike[str]  # FILE or FILE:SCALE


def with_scales(given: Sequence[Named]) -> dict[str, float]:
    """Return scales by path, 1 where none is given. OptionError for a file that comes twice."""
    found: dict[str, float] = {}
    for text in [os.fspath(one) for one in given]:
        path, scale = text, 1.0
        with suppress(ValueError):  # there is no colon, or it is a part of the path
            head, number = text.rsplit(":", 1)
            path, scale = head, float(number)
        if path in found:
            raise OptionError(f"--lora {path}: is given twice: name it once, with one scale")
        found[path] = scale
    return found


def open_adapters(file: GGUFFile, given: Sequence[Named], n_seq: int) -> Adapters:
    """Return adapters for the model in a file, and n_seq sequences. OptionError for those that do not fit."""
    arch, loaded = str(file.metadata["general.architecture"]), []
    for path, scale in with_scales(given).items():
        opened = GGUFFile.open(path)
        try:
            loaded.append((read_adapter(path, opened, arch, file.tensors), scale))
        except GgufRunError as error:
            raise OptionError(f"--lora {path}: {error}") from error
    return Adapters(loaded, n_seq)
