"""GGUF files and their blocks. Start with gguf/reader.py and blocks/types.py.

Users import `quantize` and `dequantize` from here. Both are loaded at first use: the compiler behind them takes longer
to import than the header of a model takes to read.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf_run.formats.blocks.dequantizer import dequantize as dequantize
    from gguf_run.formats.quantizers.quantizer import quantize as quantize

__all__ = ["dequantize", "quantize"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gguf_run.formats.blocks import dequantizer
    from gguf_run.formats.quantizers import quantizer

    return {"dequantize": dequantizer.dequantize, "quantize": quantizer.quantize}[name]
