"""Load a model, generate text, and the command lines. `Model` is imported when it is first asked for."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf_run.runtime.model import Model as Model

__all__ = ["Model"]


def __getattr__(name: str) -> Any:
    if name == "Model":
        from gguf_run.runtime.model import Model

        return Model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
