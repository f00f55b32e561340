"""torchao: a weight "module.weight" is stored as "module._weight_qdata", "_scale" and "_zero_point".

What they mean is told by the class of tensor that the file's own metadata names. Reference: torchao 0.18
(prototype/safetensors, quantize_/workflows); Int4Tensor's packing is that of mslk (int4_row_quantize_zp, pack_int4).
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
from gguf_run.runtime.convert.quantized.scaled import int8_weight, scale_of
from gguf_run.runtime.convert.stored.sources import F32, float8, source


def torchao(parts: Parts) -> list[Tensor]:
    """One weight of a class in _KINDS; UnsupportedError for others."""
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
    """Return the class of a tensor and its attributes, as the header of the (checked) safetensors file has them."""
    n = int.from_bytes(file.map[:8], "little")
    try:
        entry = json.loads(json.loads(file.map[8 : 8 + n])["__metadata__"][name])
        return str(entry["_type"]), dict(entry["_data"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UnsupportedError(
            f"{file.path}: does not tell what {quoted(name)} is: save the model again with torchao 0.15 or later"
        ) from None


def _int4(parts: Parts, name: str, attributes: Mapping[str, Any]) -> Tensor:
    """qdata [n_out, n_in / 2], signed nibbles, the even columns low; scale and zero_point (a weight, not a code)
    [n_group, n_out]: weight = scale * code + zero_point."""
    qdata = parts.need("_qdata", "U8", "I8", ndim=2)
    n_out, n_in = qdata.shape[0], 2 * qdata.shape[1]
    scale = parts.need("_scale", *FLOATS, ndim=2)
    zero = parts.need("_zero_point", *FLOATS, shape=scale.shape)
    if scale.shape[1] != n_out or n_in % 8:
        raise wrong(scale, f"has the shape {scale.shape}", f"[n_group, {n_out}], for rows of whole words, not {n_in}")

    def codes(first: int, end: int) -> NDArray[np.uint8]:
        return unpack_codes(qdata.array()[first:end], 4) ^ np.uint8(8)

    def read(first: int, end: int) -> GridNumbers:
        one, other = (numbers(part.array()[:, first:end].T, part.dtype) for part in (scale, zero))
        return GridNumbers(one, np.full((1, 1), 8, np.float32), other if other.any() else None)

    return parts.weight(name, Grid(n_out, 4, even_groups(n_in, scale.shape[0], scale), codes, read), qdata)


def _signed(parts: Parts, name: str, attributes: Mapping[str, Any]) -> Tensor:
    """qdata I8[n_out, n_in]; scale, and zero_point in units of a code, [n_out or 1, n_group]."""
    qdata = parts.need("_qdata", "I8", ndim=2)
    scale, zero = parts.need("_scale", *FLOATS, ndim=2), parts.get("_zero_point")
    target = attributes.get("target_dtype")
    target = target.get("_data") if isinstance(target, dict) else "int8"
    n_bits = next((n for n in range(1, 9) if target == f"int{n}"), 0)
    n_out, n_in = qdata.shape
    if not n_bits or scale.shape[0] not in (1, n_out):
        raise wrong(scale, f"has the shape {scale.shape} for {target}", f"[{n_out}, n_group] for int1 to int8")
    values = None
    if zero is not None:
        zero = parts.need("_zero_point", "I8", *FLOATS, shape=scale.shape)
        values = zero.array() if zero.dtype == "I8" else numbers(zero.array(), zero.dtype)
    groups = even_groups(n_in, scale.shape[1], scale)
    return int8_weight(parts, name, qdata, n_bits, scale.array(), scale.dtype, values, groups)


def _float8(parts: Parts, name: str, attributes: Mapping[str, Any]) -> Tensor:
    qdata = parts.need("_qdata", "F8_E4M3", "F8_E5M2", ndim=2)
    table, expand = float8(qdata.dtype), scale_of(qdata, parts.need("_scale", *FLOATS), {})

    @np.errstate(all="ignore")
    def read(first: int, end: int) -> NDArray[np.float32]:
        return table[qdata.array()[first:end]] * expand(first, end)

    return source(name, qdata.shape, F32, qdata.file, read, qdata.release)


_KINDS: Mapping[str, Callable[[Parts, str, Mapping[str, Any]], Tensor]] = {
    "Int4Tensor": _int4,
    "Int8Tensor": _signed,
    "IntxUnpackedToInt8Tensor": _signed,
    "Float8Tensor": _float8,
}
