"""Load a model, generate text, and the command lines. What needs NumPy is imported when it is first asked for."""

import importlib
from typing import TYPE_CHECKING, Any

from gguf_run.formats.errors import FormatError, GgufRunError, OptionError, UnsupportedError

if TYPE_CHECKING:
    from gguf_run.runtime.engine.reply import Answer
    from gguf_run.runtime.model import Model, Stats
    from gguf_run.runtime.sampling.params import SamplingParams
    from gguf_run.runtime.sampling.sampler import TokenLogprob

__all__ = [
    "Answer",
    "FormatError",
    "GgufRunError",
    "Model",
    "OptionError",
    "SamplingParams",
    "Stats",
    "TokenLogprob",
    "UnsupportedError",
]

_PLACES = {
    "Answer": "engine.reply",
    "Model": "model",
    "SamplingParams": "sampling.params",
    "Stats": "model",
    "TokenLogprob": "sampling.sampler",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
