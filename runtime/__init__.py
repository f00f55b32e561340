"""All that runs around the kernels, from a file to text. Start with model.py, the Python API.

The public names below are imported when they are first used: the errors do not need NumPy.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gguf_run.formats.errors import FormatError, GgufRunError, OptionError, UnsupportedError

if TYPE_CHECKING:
    from gguf_run.runtime.engine.generation import Stats as Stats
    from gguf_run.runtime.engine.reply import Answer as Answer
    from gguf_run.runtime.engine.reply import Piece as Piece
    from gguf_run.runtime.load.options import LoadOptions as LoadOptions
    from gguf_run.runtime.model import Model as Model
    from gguf_run.runtime.sampling.params import SamplingParams as SamplingParams
    from gguf_run.runtime.sampling.sampler import TokenLogprob as TokenLogprob

_PLACES = {
    "Answer": "engine.reply",
    "LoadOptions": "load.options",
    "Model": "model",
    "Piece": "engine.reply",
    "SamplingParams": "sampling.params",
    "Stats": "engine.generation",
    "TokenLogprob": "sampling.sampler",
}
__all__ = ["FormatError", "GgufRunError", "OptionError", "UnsupportedError", *_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
