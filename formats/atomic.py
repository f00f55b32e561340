"""Writing a file so that others see all of it or nothing."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends well.

    The block makes a file or a folder there. A file that stood at `path` is replaced; a folder must be empty or
    missing. If the block raises, the temporary path is removed and `path` stays as it was. OSError if the renaming
    fails.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            path.rmdir()
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
