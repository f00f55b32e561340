"""All that runs around the kernels, from a file to text. Start with model.py, the Python API.

The public names below are imported when they are first used: the commands begin with this file, and must begin at once.
"""

TYPE_CHECKING = False  # what type checkers take for typing's, which takes 10 ms to import
if TYPE_CHECKING:
    from gguf_run.formats.errors import FormatError as FormatError
    from gguf_run.formats.errors import GgufRunError as GgufRunError
    from gguf_run.formats.errors import OptionError as OptionError
    from gguf_run.formats.errors import UnsupportedError as UnsupportedError
    from gguf_run.runtime.cli.quantize import quantize_model as quantize_model
    from gguf_run.runtime.engine.reply import Answer as Answer
    from gguf_run.runtime.engine.reply import Piece as Piece
    from gguf_run.runtime.engine.sequence import Stats as Stats
    from gguf_run.runtime.load.options import LoadOptions as LoadOptions
    from gguf_run.runtime.model import Model as Model
    from gguf_run.runtime.sampling.choice import TokenLogprob as TokenLogprob
    from gguf_run.runtime.sampling.params import SamplingParams as SamplingParams

_PLACES = {
    "Answer": "runtime.engine.reply",
    "FormatError": "formats.errors",
    "GgufRunError": "formats.errors",
    "LoadOptions": "runtime.load.options",
    "Model": "runtime.model",
    "OptionError": "formats.errors",
    "Piece": "runtime.engine.reply",
    "SamplingParams": "runtime.sampling.params",
    "Stats": "runtime.engine.sequence",
    "TokenLogprob": "runtime.sampling.choice",
    "UnsupportedError": "formats.errors",
    "quantize_model": "runtime.cli.quantize",
}
__all__ = [*_PLACES]


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"gguf_run.{_PLACES[name]}"), name)
