"""Writing a file so that others see all of it or nothing.

A run writes into a folder NAME.NUMBER.partial beside the file NAME, and holds a lock on this folder. A folder without a
lock is what a killed run has left: the next run that writes the same file removes it.
"""

import errno
import functools
import os
import random
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks: what a killed run has left stays there
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path on the disk of `path`; rename it to `path` when the block ends well.

    The block makes a file or a folder there. A file that stood at `path` is replaced; a folder must be empty or
    missing. If the block raises, the temporary path is removed and `path` stays as it was.
    OSError if `path` is a device or a pipe, if the temporary path cannot be made, and if the renaming fails.
    """
    with suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise FileExistsError(errno.EEXIST, "is a device or pipe, not a file", os.fspath(path))
    with suppress(PermissionError):  # a folder may be writable and not readable
        for other in path.parent.iterdir():
            if re.fullmatch(re.escape(path.name) + r"\.\d+\.partial", other.name):
                _remove_leftover(other)
    folder, lock = _locked_folder(path)
    temporary = folder / path.name
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            path.rmdir()
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked_folder(path: Path) -> tuple[Path, int | None]:
    """Make a folder beside `path`. Return it and the open file that locks it; None: this system has no locks."""
    while True:
        folder = path.with_name(f"{path.name}.{random.SystemRandom().randrange(10**9)}.partial")
        with suppress(FileExistsError):
            folder.mkdir()
            lock = _lock(folder, wait=True)
            if lock is None or folder.is_dir():
                return folder, lock
            os.close(lock)  # another run took the new folder for a leftover before it was locked


def _remove_leftover(place: Path) -> None:
    """Remove what a killed run has left, a file or a folder. What a run holds stays."""
    lock = _lock(place, wait=False)
    if lock is not None:
        with suppress(OSError):
            place.unlink() if place.is_file() else shutil.rmtree(place)
        os.close(lock)


def _lock(place: Path, wait: bool) -> int | None:
    """Lock a file or a folder. Return the open file that holds the lock, None if somebody has it or there are none."""
    if fcntl is None:
        return None
    try:
        handle = os.open(place, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def write_own(path: Path, data: bytes) -> None:
    """Write a file that only this user may read or write. After a power cut, all of it is there or nothing.

    OSError if it cannot be written.
    """
    if not path.is_file():  # nothing, a pipe, or a link to a device, which `replacing` leaves alone
        with suppress(OSError):
            path.unlink()
    with replacing(path) as part, open(part, "xb", opener=functools.partial(os.open, mode=0o600)) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
