"""Where a session may be saved."""

import os
from pathlib import Path

from gguf_run.formats.errors import GgufRunError


def check_place(path: Path, option: str = "--session") -> None:
    """GgufRunError if a session cannot be saved at `path`: the user learns it before a long chat, not after it."""
    folder = path.absolute().parent
    if (path.exists() and not path.is_file()) or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise GgufRunError(f"{option} {path}: cannot be written: name a file in a folder that can be")
