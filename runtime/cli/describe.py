"""An error in one line, for the user who sees it, and a model in two."""

import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.terminal.text import message

if TYPE_CHECKING:
    from gguf_run.runtime.model import Model


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


def describe_model(model: "Model") -> None:
    """Print a model's sizes, and how the kernels were fitted to the CPU."""
    config = model.decoder.config
    message(
        f"{config.arch.name}: n_layer {config.n_layer}, n_embd {config.n_embd}, n_vocab {config.n_vocab}, "
        f"n_ctx {model.n_ctx} (trained {config.n_ctx_train})"
    )
    if model.tuning:
        message(f"CPU kernels: {model.tuning}")
