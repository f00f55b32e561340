"""The folder for files that can be made again: compiled kernels and downloaded models."""

import os
import sys
from pathlib import Path

from gguf_run.formats.errors import GgufRunError

# The variable that names the cache folder ("": there is none), and the folder in the home folder if it is not set.
_PLACES = {"win32": ("LOCALAPPDATA", "AppData/Local"), "darwin": ("", "Library/Caches")}


def user_cache_dir() -> Path:
    """Return this user's cache folder for gguf-run: XDG's on Linux, the native one elsewhere. It is not created.

    GgufRunError if no variable names it and the user has no home folder, as in some containers.
    """
    variable, place = _PLACES.get(sys.platform, ("XDG_CACHE_HOME", ".cache"))
    if named := os.environ.get(variable):
        return Path(named) / "gguf-run"
    try:
        return Path.home() / place / "gguf-run"
    except RuntimeError:
        advice = f"{variable} or HOME" if variable else "HOME"
        raise GgufRunError(f"this user has no home folder for compiled kernels and models: set {advice}") from None
