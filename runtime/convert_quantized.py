"""Checkpoints that are quantized already: their weights as tensors that the converter takes."""

from collections.abc import Mapping

from gguf_run.formats.errors import UnsupportedError
from gguf_run.formats.mapped import quoted
from gguf_run.formats.tensors import Tensor
from gguf_run.runtime.convert_checkpoint import Checkpoint


def plain_tensors(checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """Return all tensors by the names that the checkpoint would have unquantized ("... .weight"), in the order in which
    they are stored. Of what is quantized: Sources of F32, or of blocks where a GGUF type holds the codes as they are.
    UnsupportedError names a method that is not known."""
    quantized = checkpoint.config.get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UnsupportedError(f"{checkpoint.config.path}: quantized with {quoted(str(method))}, which is not known")
    return {name: tensor.floats() for name, tensor in checkpoint.tensors.items()}
