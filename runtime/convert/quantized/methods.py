"""Checkpoints that are quantized already: their weights as tensors that the converter takes.

What is quantized lies in several stored tensors: codes, scales, zero points. A method knows by the end of a name which
tensor marks a weight, and makes one tensor of all that belong to it.
"""

from collections.abc import Callable, Container, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.runtime.convert.quantized.bitsandbytes import bnb_4bit, bnb_8bit
from gguf_run.runtime.convert.quantized.packed import awq, gptq, marlin, packed
from gguf_run.runtime.convert.quantized.parts import Parts
from gguf_run.runtime.convert.quantized.scaled import mxfp4_experts, scaled
from gguf_run.runtime.convert.quantized.torchao import torchao
from gguf_run.runtime.convert.stored.checkpoint import Checkpoint, read_json
from gguf_run.runtime.convert.stored.sources import floats

# End of the name of the tensor that marks a quantized weight -> what makes the weight of it and its companions.
Marks = Mapping[str, Callable[[Parts], list[Tensor]]]

_GPTQ: Marks = {".qweight": gptq, ".B": marlin}
_SCALED: Marks = {"_packed": packed, "_scale_inv": scaled, "_scale": scaled}
_METHODS: Mapping[str, Marks] = MappingProxyType(
    {
        "gptq": _GPTQ,
        "gptq_marlin": _GPTQ,
        "marlin": _GPTQ,
        "awq": {".qweight": awq},
        "bitsandbytes": {".absmax": bnb_4bit, ".SCB": bnb_8bit},
        "fp8": _SCALED,
        "fbgemm_fp8": _SCALED,
        "compressed-tensors": _SCALED,
        "modelopt": _SCALED,
        "torchao": {"_qdata": torchao},
        "mxfp4": {"_blocks": mxfp4_experts},
        "gguf": {},  # what transformers saves after it has dequantized a GGUF file: plain weights
    }
)
# The types that can hold codes of quantized checkpoints.
KEPT = frozenset(("Q4_0", "Q4_1", "Q8_0", "MXFP4", "NVFP4"))
# Where config.json says nothing: files of modelopt, and of AutoGPTQ and AutoAWQ before transformers knew them.
_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
# Ends of names of tensors that are about activations and caches, or repeat what shapes say.
_UNUSED = ("input_scale", "output_scale", ".q_scale", ".k_scale", ".v_scale", "activation_scale", "input_global_scale",
           "weight_shape", "workspace", "weight_format")  # fmt: skip
# Kinds of a method that would be read wrongly or not at all: key of the config -> its values that can be read.
_KINDS: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "gptq": {"checkpoint_format": ("gptq", "gptq_v2", "marlin")},
        "awq": {"version": ("gemm", "gemv")},
        "compressed-tensors": {
            "format": ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
                       "mxfp4-pack-quantized", "mixed-precision", "dense")
        },
    }
)  # fmt: skip


def plain_tensors(checkpoint: Checkpoint, keep: Container[str] = KEPT) -> Mapping[str, Tensor]:
    """Return all tensors by the names that the checkpoint would have unquantized ("... .weight").

    Of what is quantized: Sources of F32, or of blocks where a type in `keep` holds the codes as they are. Experts of
    gpt-oss get names that end in ".weight": their rows are outputs, as everywhere. NVFP4 has a second tensor,
    "... .scale" (F32, one value), that all weights are to be multiplied by.
    UnsupportedError names a method that is not known; FormatError a tensor that is missing or has the wrong shape.
    """
    path, config = _quantization(checkpoint)
    if config is None:
        return {name: floats(tensor) for name, tensor in checkpoint.tensors.items()}
    marks = _marks(path, config)
    left = dict(checkpoint.tensors)
    found: dict[str, Tensor] = {}
    for end, decode in marks.items():
        for name in [name for name in left if name.endswith(end) and not name.endswith(_UNUSED)]:
            parts = Parts(checkpoint.tensors, name.removesuffix(end), config, path, keep)
            if name in left:
                for tensor in decode(parts):
                    found[tensor.name] = tensor
                for used in parts.used:
                    left.pop(used, None)
    found |= {name: floats(tensor) for name, tensor in left.items() if not name.endswith(_UNUSED)}
    return found


def _quantization(checkpoint: Checkpoint) -> tuple[Path, dict[str, Any] | None]:
    """Return how the checkpoint is quantized, or None, and the file that says so."""
    path, config = checkpoint.config.path, checkpoint.config.get("quantization_config", "compression_config")
    for name, method in _FILES.items():
        other = checkpoint.directory / name
        if config is None and other.is_file():
            path, values = other, read_json(other)
            config = values.get("quantization", values)
            config = {"quant_method": method, **config} if isinstance(config, dict) else config
    if config is not None and not isinstance(config, dict):
        raise FormatError(f"{path}: the quantization is {quoted(str(config))}, must be an object")
    return path, config


def _marks(path: Path, config: dict[str, Any]) -> Marks:
    """Return what a method marks its weights with. UnsupportedError for an unknown method or kind of it."""
    method = str(config.get("quant_method") or ("gptq" if "bits" in config else None)).lower()
    if method in ("auto-round", "intel/auto-round"):
        packing = str(config.get("packing_format"))
        method = next((known for known in ("awq", "gptq") if known in packing), method)
    if method not in _METHODS:
        raise UnsupportedError(
            f"{path}: quantized with {quoted(method)}, which is not known: {' '.join(_METHODS)} are; get the "
            "model before it was quantized"
        )
    for key, known in _KINDS.get(method, {}).items():
        kind = config.get(key)
        if kind is not None and str(kind).lower() not in known:
            raise UnsupportedError(f"{path}: {method} with {key} {quoted(str(kind))}: known are {' '.join(known)}")
    return _METHODS[method]
