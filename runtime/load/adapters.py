"""Opens the adapters that LoadOptions.lora names, for a model that is about to be loaded."""

import os
from collections.abc import Sequence

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.models.adapted_step import Adapters
from gguf_run.models.adapters import read_adapter
from gguf_run.runtime.load.options import Lora


def with_scales(given: Sequence[Lora]) -> dict[str, float]:
    """Return scales by path. given: "FILE", "FILE:SCALE" or (FILE, SCALE). OptionError for a file that comes twice."""
    found: dict[str, float] = {}
    for one in given:
        path, scale = one if isinstance(one, tuple) else _split(os.fspath(one))
        if os.fspath(path) in found:
            raise OptionError(f"--lora {path}: is given twice: name it once, with one scale")
        found[os.fspath(path)] = scale
    return found


def _split(text: str) -> tuple[str, float]:
    """Take the scale off the end of FILE:SCALE. It is 1 if there is none."""
    path, _, number = text.rpartition(":")
    try:
        return (path, float(number)) if path else (text, 1.0)
    except ValueError:  # a colon of the path
        return text, 1.0


def open_adapters(file: GGUFFile, given: Sequence[Lora], n_seq: int) -> Adapters:
    """Return adapters for the model in a file, and n_seq sequences. OptionError for those that do not fit."""
    arch, loaded = str(file.metadata["general.architecture"]), []
    for path, scale in with_scales(given).items():
        try:
            loaded.append((read_adapter(path, GGUFFile.open(path), arch, file.tensors), scale))
        except GgufRunError as error:
            raise OptionError(f"--lora {error}") from error
    return Adapters(loaded, n_seq)
