"""Where files that can be made again live: compiled kernels and downloaded models."""

import os
import sys
from pathlib import Path


def user_cache_dir() -> Path:
    """Return this user's cache folder for gguf-run (not created): XDG on Linux, the native places elsewhere."""
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData/Local")
    elif sys.platform == "darwin":
        base = home / "Library/Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "gguf-run"
