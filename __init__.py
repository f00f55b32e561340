"""gguf-run: GGUF language models in Python. `from gguf_run import Model`; docs/python.md shows what it can do.

The public names are those of runtime/, imported when they are first used. This file and its neighbours stand at the top
because the five folders beside them are the packages `gguf_run.formats` to `gguf_run.runtime`.
"""

TYPE_CHECKING = False  # what type checkers take for typing's: the commands begin with this file, and must begin at once
if TYPE_CHECKING:
    from gguf_run.runtime import Answer as Answer
    from gguf_run.runtime import FormatError as FormatError
    from gguf_run.runtime import GgufRunError as GgufRunError
    from gguf_run.runtime import LoadOptions as LoadOptions
    from gguf_run.runtime import Model as Model
    from gguf_run.runtime import OptionError as OptionError
    from gguf_run.runtime import Piece as Piece
    from gguf_run.runtime import SamplingParams as SamplingParams
    from gguf_run.runtime import Stats as Stats
    from gguf_run.runtime import TokenLogprob as TokenLogprob
    from gguf_run.runtime import UnsupportedError as UnsupportedError
    from gguf_run.runtime import quantize_model as quantize_model

    __version__: str


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("gguf-run")
    from importlib import import_module

    runtime = import_module("gguf_run.runtime")  # a `from` would ask this function again
    if name not in runtime.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(runtime, name)
