"""Checkpoints that are quantized already: their weights as tensors that the converter takes.

A quantized weight is stored as several tensors: codes, scales, zero points. A method is known by the end of the name of
one of them, its mark. From that tensor and those beside it the method makes one tensor.
"""

from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

from gguf_run.formats.blocks.types import CHECKPOINT_TYPES
from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.runtime.convert.quantized.bitsandbytes import bnb_4bit, bnb_8bit
from gguf_run.runtime.convert.quantized.packed import awq, gptq, marlin, mlx, packed
from gguf_run.runtime.convert.quantized.parts import Parts
from gguf_run.runtime.convert.quantized.scaled import mxfp4_experts, scaled
from gguf_run.runtime.convert.quantized.torchao import torchao
from gguf_run.runtime.convert.stored.checkpoint import Checkpoint, read_json
from gguf_run.runtime.convert.stored.sources import floats

# Mark -> function that makes the weight of all tensors whose names begin alike.
Marks = Mapping[str, Callable[[Parts], list[Tensor]]]

_GPTQ: Marks = {".qweight": gptq, ".B": marlin}
_SCALED: Marks = {"_packed": packed, "_scale_inv": scaled, "_scale": scaled}
_METHODS: Mapping[str, Marks] = {
    **dict.fromkeys(("gptq", "gptq_marlin", "marlin"), _GPTQ),
    "awq": {".qweight": awq},
    "bitsandbytes": {".absmax": bnb_4bit, ".SCB": bnb_8bit},
    **dict.fromkeys(("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt"), _SCALED),
    "torchao": {"_qdata": torchao},
    "mxfp4": {"_blocks": mxfp4_experts},
    "mlx": {".scales": mlx},
    "gguf": {},  # what transformers saves after it has dequantized a GGUF file: plain weights
}
# The types of GGUF that can hold codes of quantized checkpoints.
KEPT = frozenset(("Q4_0", "Q4_1", "Q8_0", "MXFP4", "NVFP4"))
_INPUT_SCALE = "input_scale"
RUN = KEPT | {type.name for type in CHECKPOINT_TYPES} | {_INPUT_SCALE}  # in memory, with the scales of activations
# Files that name the method where config.json does not: modelopt's, and old ones of AutoGPTQ and AutoAWQ.
_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
# Ends of names of tensors that concern activations and caches, or that repeat a shape.
_UNUSED = (_INPUT_SCALE, "output_scale", ".q_scale", ".k_scale", ".v_scale", "activation_scale", "input_global_scale",
           "weight_shape", "workspace", "weight_format")  # fmt: skip
# Methods that have kinds: the key of the config, and the values that can be read.
_KINDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "gptq": ("checkpoint_format", ("gptq", "gptq_v2", "marlin")),
    "awq": ("version", ("gemm", "gemv")),
    "compressed-tensors": ("format", (
        "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
        "mxfp4-pack-quantized", "mixed-precision", "dense",
    )),
}  # fmt: skip


def plain_tensors(checkpoint: Checkpoint, keep: Container[str] = KEPT) -> Mapping[str, Tensor]:
    """Return all tensors by the names of a checkpoint that is not quantized ("... .weight").

    Quantized weights become blocks, if a type in `keep` holds their codes unchanged, else F32. Weights of NVFP4 in
    blocks have a second tensor "... .scale": F32[1], which multiplies all of them. Experts of gpt-oss get names that
    end in ".weight", because their rows are outputs.

    UnsupportedError for an unknown method. FormatError for a tensor that is missing or has the wrong shape.
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
    for name, stored in left.items():
        is_input = _INPUT_SCALE in keep and name.endswith(f".{_INPUT_SCALE}") and ".experts." not in name
        if is_input or not name.endswith(_UNUSED):
            found[name] = floats(stored)
    return found


def _quantization(checkpoint: Checkpoint) -> tuple[Path, dict[str, Any] | None]:
    """Return the quantization config, or None, and the file that holds it."""
    path, config = checkpoint.config.path, checkpoint.config.get("quantization_config", "compression_config")
    for name, method in _FILES.items():
        other = checkpoint.directory / name
        if config is None and other.is_file():
            path, values = other, read_json(other)
            config = values.get("quantization", values)
            config = {"quant_method": method, **config} if isinstance(config, dict) else config
    # MLX writes its numbers under either name, and no method.
    config = checkpoint.config.get("quantization") if config is None else config
    if isinstance(config, dict) and "quant_method" not in config:
        is_mlx = any(name.endswith(".biases") for name in checkpoint.tensors)
        config = {**config, "quant_method": "mlx"} if is_mlx else config
    if config is not None and not isinstance(config, dict):
        raise FormatError(f"{path}: the quantization is {quoted(str(config))}, must be an object")
    return path, config


def _marks(path: Path, config: dict[str, Any]) -> Marks:
    """Return the marks of a method. UnsupportedError for an unknown method, or kind of a method."""
    method = str(config.get("quant_method") or ("gptq" if "bits" in config else None)).lower()
    if method in ("auto-round", "intel/auto-round"):
        packing = str(config.get("packing_format"))
        method = next((known for known in ("awq", "gptq") if known in packing), method)
    if method not in _METHODS:
        raise UnsupportedError(
            f"{path}: quantized with {quoted(method)}, which is not known: {' '.join(_METHODS)} are; get the model "
            "before it was quantized"
        )
    key, known = _KINDS.get(method, ("", ()))
    kind = config.get(key)
    if key and kind is not None and str(kind).lower() not in known:
        raise UnsupportedError(f"{path}: {method} with {key} {quoted(str(kind))}: known are {' '.join(known)}")
    return _METHODS[method]
