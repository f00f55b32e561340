"""FP8, int8 and FP4 weights with scales of their own: compressed-tensors, modelopt, DeepSeek's FP8, MXFP4 and NVFP4.

Scales are one number, one for each row, or one for each rectangle (DeepSeek: 128 x 128; NVFP4: 1 x 16 with e4m3 scales
and one f32 for all; MXFP4: 1 x 32 with powers of two). References: OCP MX 1.0, compressed-tensors 0.20, modelopt 0.47.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks import grids
from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.errors import UnsupportedError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.formats.safetensors import StoredArray
from gguf_run.runtime.convert.quantized.grid import Grid, GridNumbers
from gguf_run.runtime.convert.quantized.parts import FLOATS, Parts, even_groups, numbers, rows_of, wrong
from gguf_run.runtime.convert.stored.sources import F32, float8, source

_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = (*FLOATS, "F8_E4M3", "F8_E8M0", "U8")
_GROUP = {"NVFP4": 16, "MXFP4": 32}  # weights per scale


def scaled(parts: Parts) -> list[Tensor]:
    """A weight of FP8, int8 or FP4 and its "_scale" or "_scale_inv" (which both are multiplied by); none if `base` is
    no tensor, as for the scale of an activation."""
    weight = parts.get("")
    scale = parts.get("_scale_inv") or parts.get("_scale")
    if weight is None or scale is None:
        return []
    if len(weight.shape) < 2 or 0 in (*weight.shape, *scale.shape):
        raise wrong(weight, f"has the shape {weight.shape} and a scale of {scale.shape}", "two dimensions or more")
    if scale.dtype not in _SCALES:
        raise wrong(scale, f"has values of type {scale.dtype}", " or ".join(_SCALES))
    if f"{parts.base.rpartition('.')[0]}.pre_quant_scale" in parts.stored:
        raise UnsupportedError(
            f"{weight.file.path}: {quoted(parts.base)} has a pre_quant_scale, which GGUF cannot hold"
        )
    if weight.dtype == "U8":
        return fp4(parts, weight)
    if weight.dtype == "I8":
        return [_int8(parts, weight, scale)]
    if weight.dtype not in _FP8:
        raise wrong(weight, f"has values of type {weight.dtype}", f"I8 U8 {' '.join(_FP8)}")
    table, expand, n_in = float8(weight.dtype), scale_of(weight, scale, parts.config), weight.shape[-1]
    codes = weight.array().reshape(-1, n_in)

    @np.errstate(all="ignore")
    def read(first: int, end: int) -> NDArray[np.float32]:
        out = table[codes[first:end]]
        out *= expand(first, end)
        return out

    return [source(parts.base, weight.shape, F32, weight.file, read, weight.release)]


def scale_of(weight: StoredArray, scale: StoredArray, config: Any) -> Callable[[int, int], NDArray[np.float32]]:
    """Return expand(first, end): what rows first .. end of a weight [..., n_out, n_in] are multiplied by, an array of
    as many rows or 1 and n_in columns or 1. A row is one of all dimensions but the last."""
    *lead, n_out, n_in = weight.shape
    values = scale.array()
    if values.size == 1:
        return lambda first, end: numbers(values.reshape(1, 1), scale.dtype)
    if values.ndim > len(weight.shape):
        values = values.squeeze()
    if values.shape == tuple(lead):
        values = values[..., None, None]
    elif values.shape == (*lead, n_out):
        values = values[..., None]
    block = config.get("weight_block_size")
    block = block if isinstance(block, list) and len(block) == 2 else (None, None)
    sizes = [_block(n, s, b) for n, s, b in zip((n_out, n_in), values.shape[-2:], block, strict=False)]
    if values.ndim != len(weight.shape) or values.shape[:-2] != tuple(lead) or 0 in sizes:
        raise wrong(scale, f"has the shape {scale.shape}", f"blocks of the weight {weight.shape}")
    n_rows = values.shape[-2]
    flat, columns = values.reshape(-1, values.shape[-1]), np.arange(n_in) // sizes[1]

    def expand(first: int, end: int) -> NDArray[np.float32]:
        row = np.arange(first, end)
        part = numbers(flat[row // n_out * n_rows + row % n_out // sizes[0]], scale.dtype)
        return part if part.shape[1] == 1 else part[:, columns]

    return expand


def _block(n: int, n_scales: int, wanted: Any) -> int:
    """Return how many of n weights share one of n_scales; 0 if that cannot be."""
    powers = [n // n_scales, *(1 << i for i in range(16))]  # equal blocks; else the last is cut off
    sizes = [wanted, n if n_scales == 1 else 0, *powers]
    return next((b for b in sizes if type(b) is int and b > 0 and -(-n // b) == n_scales), 0)


def _int8(parts: Parts, weight: StoredArray, scale: StoredArray) -> Tensor:
    """int8 codes with a scale for all, a row or a group of a row, and perhaps zero points of the same shape."""
    if len(weight.shape) != 2:
        raise wrong(weight, f"has the shape {weight.shape}", "two dimensions")
    n_out, n_in = weight.shape
    table = scale.array().reshape(-1, scale.shape[-1] if len(scale.shape) > 1 else 1)
    if len(table) not in (1, n_out):
        raise wrong(scale, f"has the shape {scale.shape}", f"one row, or {n_out}")
    zero = None
    if parts.get("_zero_point") is not None:
        zero = parts.need("_zero_point", "I8", shape=scale.shape).array().reshape(table.shape)
    groups = even_groups(n_in, table.shape[1], scale)
    return int8_weight(parts, parts.base, weight, 8, table, scale.dtype, zero, groups)


def int8_weight(
    parts: Parts,
    name: str,
    weight: StoredArray,
    n_bits: int,
    scale: NDArray[Any],
    dtype: str,
    zero: NDArray[Any] | None,
    groups: NDArray[np.int64],
) -> Tensor:
    """Return the weight of signed codes I8[n_out, n_in] of n_bits; scale (stored as dtype) and zero [n_out or 1,
    n_group]. The grid's codes are not negative: 2**(n_bits - 1) is added to them and to the zero points.
    """
    n_out, half = weight.shape[0], 1 << n_bits - 1
    scale = np.broadcast_to(scale, (n_out, scale.shape[1]))
    zero = np.zeros((1, 1), np.int8) if zero is None else zero
    zero = np.broadcast_to(zero, (n_out, zero.shape[1]))

    def codes(first: int, end: int) -> NDArray[np.uint8]:
        found = weight.array()[first:end]
        if n_bits < 8 and (found.min() < -half or found.max() >= half):
            raise wrong(weight, f"has codes {found.min()} to {found.max()}", f"{-half} to {half - 1} ({n_bits} bits)")
        return found.view(np.uint8) + np.uint8(half)

    def read(first: int, end: int) -> GridNumbers:
        return GridNumbers(numbers(scale[first:end], dtype), zero[first:end].astype(np.float32) + half)

    return parts.weight(name, Grid(n_out, n_bits, groups, codes, read), weight)


def fp4(parts: Parts, weight: StoredArray) -> list[Tensor]:
    """NVFP4 and MXFP4: codes U8[n_out, n_in / 2], the even columns in the low nibbles, scales [n_out, n_in / group].

    A scale for all: "_scale_2" multiplies (modelopt), "_global_scale" divides (compressed-tensors).
    """
    scale = parts.need("_scale", "F8_E4M3", "U8", "F8_E8M0", ndim=2)
    name = parts.base.removesuffix("_packed")
    kind = "NVFP4" if scale.dtype == "F8_E4M3" else "MXFP4"
    if len(weight.shape) != 2 or (scale.shape[0], scale.shape[1] * _GROUP[kind]) != (
        weight.shape[0],
        2 * weight.shape[1],
    ):
        raise wrong(
            scale, f"has the shape {scale.shape}", f"one scale for {_GROUP[kind]} weights of {weight.shape[1] * 2}"
        )
    times, over = parts.get("_scale_2"), parts.get("_global_scale")
    for stored in (times, over):
        if stored is not None and (stored.dtype != "F32" or stored.data.nbytes != 4):
            raise wrong(stored, f"is {stored.dtype} of shape {stored.shape}", "one F32")
    factor = None
    if times is not None:
        factor = times.array().reshape(-1)[0]
    elif over is not None:
        factor = np.float32(1) / over.array().reshape(-1)[0]
    return _fp4_tensors(parts, name, kind, weight, weight.array(), scale.array().view(np.uint8), factor)


def mxfp4_experts(parts: Parts) -> list[Tensor]:
    """gpt-oss: _blocks U8[n_expert, n_out, n_in / 32, 16] and _scales U8[n_expert, n_out, n_in / 32]."""
    blocks = parts.need("_blocks", "U8", ndim=4)
    scales = parts.need("_scales", "U8", shape=blocks.shape[:-1])
    if blocks.shape[-1] != 16:
        raise wrong(blocks, f"has the shape {blocks.shape}", "rows of blocks of 16 bytes")
    n_expert, n_out, n_block, _ = blocks.shape
    codes = blocks.array().reshape(n_expert, n_out, 16 * n_block)
    return _fp4_tensors(parts, f"{parts.base}.weight", "MXFP4", blocks, codes, scales.array(), None)


def _fp4_tensors(
    parts: Parts,
    name: str,
    kind: str,
    weight: StoredArray,
    codes: NDArray[np.uint8],
    scale: NDArray[np.uint8],
    factor: np.float32 | None,
) -> list[Tensor]:
    """Return the weight codes U8[..., n_in / 2] with scale U8[..., n_in / group], and its factor if it has one."""
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    type, group = type_by_name(kind), _GROUP[kind]
    codes, scale = codes.reshape(rows_of(shape), -1), scale.reshape(rows_of(shape), -1)
    # ggml takes no sign from a scale of NVFP4, and takes NaN for 0.
    kept = shape[-1] % type.block_size == 0 and (kind == "MXFP4" or bool((scale < 0x7F).all()))

    def nibbles(first: int, end: int) -> NDArray[np.uint8]:
        pairs = codes[first:end].reshape(end - first, -1, group // 2)
        return np.stack((pairs & 15, pairs >> 4), axis=-1).reshape(end - first, -1, group)

    def blocks(first: int, end: int) -> NDArray[np.uint8]:
        found, half = nibbles(first, end), group // 2
        out = np.empty((end - first, shape[-1] // type.block_size), type.dtype)
        head, qs = ("d" if kind == "NVFP4" else "e"), found[..., :half] | found[..., half:] << 4
        out[head] = scale[first:end].reshape(out[head].shape)
        out["qs"] = qs.reshape(out["qs"].shape)
        return out.view(np.uint8)

    @np.errstate(all="ignore")
    def floats(first: int, end: int) -> NDArray[np.float32]:
        out: NDArray[np.float32] = (grids.e2m1() * np.float32(0.5))[nibbles(first, end)]
        out *= numbers(scale[first:end], "F8_E4M3" if kind == "NVFP4" else "U8")[..., None]
        if factor is not None:
            out *= factor
        return out.reshape(end - first, -1)

    if not kept or kind not in parts.keep:
        return [source(name, shape, F32, weight.file, floats)]
    tensors: list[Tensor] = [source(name, shape, type, weight.file, blocks)]
    if factor is not None:
        one = np.array([factor], np.float32)
        tensors.append(source(f"{name.removesuffix('.weight')}.scale", (1,), F32, weight.file, lambda a, b: one))
    return tensors
