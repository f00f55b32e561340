"""gguf-run --warm-up all."""

from collections.abc import Callable

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.hub.listing import cached_models
from gguf_run.runtime.terminal.text import message


def warm_up_all(warm_up: Callable[[str | None], None]) -> None:
    """Warm up each model on this machine. One that cannot be run is said, and the others follow."""
    failed = []
    for model in cached_models():
        message(f"{model.name or model.paths[0].name}:")
        try:
            warm_up(model.name or None)
        except GgufRunError as error:
            failed.append(model)
            message(f"error: {error}")
    if failed:
        raise GgufRunError(f"{len(failed)} models cannot be run; the others are ready")
