"""The folder for files that can be made again: compiled kernels and downloaded models.

Machine code from a file is run, so the file must be this user's own. A checksum cannot tell: whoever writes code can
write a checksum too. `read_own` therefore asks the system who else could have written the file, after the file is open.
What then happens to the folders above changes nothing.
"""

import errno
import os
import stat
import sys
from pathlib import Path

from gguf_run.formats.errors import GgufRunError

_MOST_BYTES = 64 << 20  # of a file that read_own reads
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


def other_writers(status: os.stat_result) -> str:
    """Return who else may have written a file or a folder, in words, or "" for nobody.

    Windows keeps no such modes. There the access lists of the user's own folder keep others out.
    """
    if sys.platform == "win32":
        return ""
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}, this is user {os.geteuid()}"
    mode = stat.S_IMODE(status.st_mode)
    return f"can be written by others (mode {mode:o})" if mode & (stat.S_IWGRP | stat.S_IWOTH) else ""


def read_own(path: Path) -> bytes:
    """Return the bytes of a file, at most 64 MB. OSError unless it is a file that nobody but this user may write."""
    # Without waiting: opening a named pipe would wait for a writer.
    wait_not = getattr(os, "O_NONBLOCK", 0)
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | wait_not)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or other_writers(status):
            raise PermissionError(errno.EPERM, "is not a file that only this user may write", os.fspath(path))
        return file.read(_MOST_BYTES)
