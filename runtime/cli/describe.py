"""An error in one line, for the user who sees it."""

import traceback
from pathlib import Path

from gguf_run.formats.errors import GgufRunError


def describe(error: Exception) -> str:
    """Return what went wrong, for the line that a user sees."""
    if isinstance(error, GgufRunError):
        return str(error)
    if isinstance(error, MemoryError) or str(error) == "can't start new thread":
        detail = f" ({error})" if str(error) else ""
        return f"out of memory{detail}: choose a smaller model or context, or close other programs"
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        return reason if error.filename is None else f"{error.filename}: {reason}"
    # A bug of ours: still one line. Commands with --verbose show the traceback.
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"internal error, please report it: {type(error).__name__}: {error} ({place})"
