"""torchao: a weight "module.weight" is stored as "module._weight_qdata", "_scale" and "_zero_point".

The metadata of the file names the class of each weight, which says what they mean. References: torchao 0.18
(prototype/safetensors, quantize_/workflows), and mslk for the packing of Int4Tensor (int4_row_quantize_zp, pack_int4).
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import UnsupportedError
from gguf_run.formats.gguf.mapped import MappedFile, quoted
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.runtime.convert.quantized.grid import Grid, GridNumbers, unpack_codes
from gguf_run.runtime.convert.quantized.parts import FLOATS, Parts, even_groups, numbers, wrong
from gguf_run.runtime.convert.quantized.scaled import fp8_weight, int8_weight


def torchao(parts: Parts) -> list[Tensor]:
    """Return a weight of a class in _KINDS. UnsupportedError for other classes."""
    module, _, weight = parts.base.rpartition("._")
    name = f"{module}.{weight}"
    qdata = parts.need("_qdata")
    kind, attributes = _described(qdata.file, name)
    if kind not in _KINDS or f"{parts.base}_act_pre_scale" in parts.stored:
        raise UnsupportedError(
            f"{qdata.file.path}: {quoted(name)} is a torchao {quoted(kind)}: known are {' '.join(_KINDS)}, without "
            "act_pre_scale"
        )
    for end in ("_act_quant_scale", "_act_quant_zero_point"):
        parts.get(end)
    return [_KINDS[kind](parts, name, attributes)]


def _described(file: MappedFile, name: str) -> tuple[str, Mapping[str, Any]]:
    """Return the class of a tensor and its attributes, from the header of the (checked) safetensors file."""
    n = int.from_bytes(file.map[:8], "little")
    try:
        entry = json.loads(json.loads(file.map[8 : 8 + n])["__metadata__"][name])
        return str(entry["_type"]), dict(entry["_data"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UnsupportedError(
            f"{file.path}: does not tell what {quoted(name)} is: save the model again with torchao 0.15 or later"
        ) from None


def _int4(parts: Parts, name: str, attributes: Mapping[str, Any]) -> Tensor:
    """Return weight = scale * code + zero_point, where zero_point is a weight, not a code.

    _qdata: [n_out, n_in / 2], signed nibbles, the even columns low. _scale, _zero_point: [n_group, n_out].
    """
    qdata = parts.need("_qdata", "U8", "I8", ndim=2)
    n_out, n_in = qdata.shape[0], 2 * qdata.shape[1]
    scale = parts.need("_scale", *FLOATS, ndim=2)
    zero = parts.need("_zero_point", *FLOATS, shape=scale.shape)
    if scale.shape[1] != n_out or n_in % 8:
        raise wrong(scale, f"[n_group, {n_out}], for rows of whole words, not {n_in}")

    def codes(first: int, end: int) -> NDArray[np.uint8]:
        return unpack_codes(qdata.array()[first:end], 4) ^ np.uint8(8)

    def read(first: int, end: int) -> GridNumbers:
        one, other = (numbers(part.array()[:, first:end].T, part.dtype) for part in (scale, zero))
        return GridNumbers(one, np.full((1, 1), 8, np.float32), other if other.any() else None)

    return parts.weight(name, Grid(n_out, 4, even_groups(n_in, scale.shape[0], scale), codes, read), qdata)


def _signed(parts: Parts, name: str, attributes: Mapping[str, Any]) -> Tensor:
    """Return the weight of _qdata I8[n_out, n_in]. _scale and _zero_point: [n_out or 1, n_group]."""
    qdata, scale = parts.need("_qdata", "I8", ndim=2), parts.need("_scale", *FLOATS, ndim=2)
    target = attributes.get("target_dtype")
    target = target.get("_data") if isinstance(target, dict) else "int8"
    n_bits = next((n for n in range(1, 9) if target == f"int{n}"), 0)
    if not n_bits:
        raise wrong(qdata, "int1 to int8", f"has codes of {target}")
    return int8_weight(parts, name, qdata, scale, n_bits, zero_types=("I8", *FLOATS))


def _float8(parts: Parts, name: str, attributes: Mapping[str, Any]) -> Tensor:
    qdata = parts.need("_qdata", "F8_E4M3", "F8_E5M2", ndim=2)
    return fp8_weight(parts, name, qdata, parts.need("_scale", *FLOATS), {})


_KINDS: Mapping[str, Callable[[Parts, str, Mapping[str, Any]], Tensor]] = {
    "Int4Tensor": _int4,
    "Int8Tensor": _signed,
    "IntxUnpackedToInt8Tensor": _signed,
    "Float8Tensor": _float8,
}
