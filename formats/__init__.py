"""GGUF files and their blocks. `quantize` and `dequantize` stand here for users; they are loaded when first asked for,
because what they need takes longer to import than a model's header to read."""

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
