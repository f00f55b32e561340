"""Where files that can be made again live: compiled kernels and downloaded models."""

import os
import sys
from pathlib import Path

from gguf_run.formats.errors import GgufRunError

# Variable that names the folder ("": none does), and where it is in the home folder else.
_PLACES = {"win32": ("LOCALAPPDATA", "AppData/Local"), "darwin": ("", "Library/Caches")}


def user_cache_dir() -> Path:
    """Return this user's cache folder for gguf-run (not created): XDG on Linux, the native places elsewhere.

    GgufRunError for a user without a home folder, as in some containers, if it takes one to find that out.
    """
    variable, place = _PLACES.get(sys.platform, ("XDG_CACHE_HOME", ".cache"))
    if named := os.environ.get(variable):
        return Path(named) / "gguf-run"
    try:
        return Path.home() / place / "gguf-run"
    except RuntimeError:
        advice = f"{variable} or HOME" if variable else "HOME"
        raise GgufRunError(f"this user has no home folder for compiled kernels and models: set {advice}") from None
