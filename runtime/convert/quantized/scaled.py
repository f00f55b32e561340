"""FP8, int8 and FP4 weights with scales of their own: compressed-tensors, modelopt, DeepSeek's FP8, MXFP4 and NVFP4.

A scale belongs to all weights, to a row, or to a rectangle: to 128 x 128 weights in DeepSeek's FP8, to 16 weights of a
row in NVFP4, to 32 in MXFP4. References: OCP MX 1.0, compressed-tensors 0.20, modelopt 0.47.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.coded import float8
from gguf_run.formats.blocks.grids import codebook
from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.errors import UnsupportedError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.formats.safetensors import StoredArray
from gguf_run.runtime.convert.quantized.grid import Grid, GridNumbers
from gguf_run.runtime.convert.quantized.parts import FLOATS, Parts, even_groups, numbers, wrong
from gguf_run.runtime.convert.stored.sources import F32, Source, computed

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = (*FLOATS, "F8_E4M3", "F8_E8M0", "U8")
_GROUP = {"NVFP4": 16, "MXFP4": 32}  # weights per scale


def scaled(parts: Parts) -> list[Tensor]:
    """Return a weight of FP8, int8 or FP4 that is multiplied by its "_scale" or "_scale_inv".

    The list is empty if `base` is no tensor: then the scale is one of an activation.
    """
    weight = parts.get("")
    scale = parts.get("_scale_inv") or parts.get("_scale")
    if weight is None or scale is None:
        return []
    if len(weight.shape) < 2 or 0 in (*weight.shape, *scale.shape):
        raise wrong(weight, "two dimensions or more", f"has the shape {weight.shape} and a scale of {scale.shape}")
    if scale.dtype not in _SCALES:
        raise wrong(scale, " or ".join(_SCALES), f"has values of type {scale.dtype}")
    if f"{parts.base.rpartition('.')[0]}.pre_quant_scale" in parts.stored:
        raise UnsupportedError(f"{weight.file.path}: {quoted(parts.base)} has a pre_quant_scale: GGUF cannot hold it")
    if weight.dtype == "U8":
        return fp4(parts, weight)
    if weight.dtype == "I8":
        return [int8_weight(parts, parts.base, weight, scale)]
    if weight.dtype not in _FP8:
        raise wrong(weight, f"I8 U8 {' '.join(_FP8)}", f"has values of type {weight.dtype}")
    return [fp8_weight(parts, parts.base, weight, scale, parts.config)]


def fp8_weight(parts: Parts, name: str, weight: StoredArray, scale: StoredArray, config: Any) -> Tensor:
    """Return FP8 codes and their scales as they are, if a type in parts.keep holds them; else their product as F32.

    config: may have weight_block_size.
    """
    table, (expand, n_rows, n_columns) = float8(weight.dtype), _scale_of(weight, scale, config)
    codes, n_in = weight.array().reshape(-1, weight.shape[-1]), weight.shape[-1]
    check_scales(scale)
    in_rows = n_columns >= n_in
    kind = weight.dtype.replace("F8", "FP8") + ("" if in_rows else "_128")
    is_kept = kind in parts.keep and (in_rows or not (n_rows % 16 or n_columns % 128))
    type = type_by_name(kind if is_kept else "F32")
    least_nan = 0x7F if weight.dtype == "F8_E4M3" else 0x7C

    @np.errstate(all="ignore")
    def read(first: int, end: int) -> Floats:
        return table[codes[first:end]] * expand(first, end, 1)

    def blocks(first: int, end: int) -> Bytes:
        found, factor = codes[first:end], expand(first, end, type.block_size)
        if (found & 0x7F >= least_nan).any():
            raise wrong(weight, "numbers", "has codes that are NaN or infinite")
        out = np.empty((end - first, n_in // type.block_size), type.dtype)
        out["d"], out["qs"] = factor, found.reshape(*out.shape, type.block_size)
        return out.view(np.uint8)

    if not is_kept or n_in % type.block_size:
        return Source(name, weight.shape[::-1], F32, weight.file, read, weight.release)
    return Source(name, weight.shape[::-1], type, weight.file, blocks, weight.release)


def check_scales(scale: StoredArray, values: Floats | None = None) -> None:
    """Raise FormatError if values (default: the stored ones) are negative, infinite or NaN. Zeros may have scale 0."""
    values = numbers(scale.array(), scale.dtype) if values is None else values
    if not ((values >= 0) & (values < np.inf)).all():
        raise wrong(scale, "positive numbers", f"has scales {values.min()} to {values.max()}")


def _scale_of(
    weight: StoredArray, scale: StoredArray, config: Any
) -> tuple[Callable[[int, int, int], Floats], int, int]:
    """Return how to get the factors of weight[..., n_out, n_in], and the rows and columns that share one.

    The first is a function (first, end, step) that gives those of rows first .. end and every step-th column. They have
    as many rows as asked for, or 1, and as many columns, or 1. All dimensions but the last are rows.
    """
    *lead, n_out, n_in = weight.shape
    values = scale.array()
    if values.size == 1:
        return lambda first, end, step: numbers(values.reshape(1, 1), scale.dtype), n_out, n_in
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
        raise wrong(scale, f"blocks of the weight {weight.shape}")
    n_rows = values.shape[-2]
    flat = values.reshape(-1, values.shape[-1])

    def expand(first: int, end: int, step: int) -> Floats:
        row = np.arange(first, end)
        part = numbers(flat[row // n_out * n_rows + row % n_out // sizes[0]], scale.dtype)
        return part if part.shape[1] == 1 else part[:, np.arange(0, n_in, step) // sizes[1]]

    return expand, sizes[0], sizes[1]


def _block(n: int, n_scales: int, wanted: Any) -> int:
    """Return how many of n weights share one of n_scales; 0 if no size fits. The last block may be cut off."""
    sizes = [wanted, n if n_scales == 1 else 0, n // n_scales, *(1 << i for i in range(16))]
    return next((b for b in sizes if type(b) is int and b > 0 and -(-n // b) == n_scales), 0)


def int8_weight(
    parts: Parts,
    name: str,
    weight: StoredArray,
    scale: StoredArray,
    n_bits: int = 8,
    unit: int = 1,
    zero_types: tuple[str, ...] = ("I8",),
) -> Tensor:
    """Return the weight of signed codes on a grid.

    weight: I8[n_out, n_in], codes of n_bits.
    scale: [n_out or 1, n_group], or [n_out or 1]: the weight of code `unit`.
    zero_types: allowed types of "_zero_point". It has the same shape, in units of a code. If it is missing, all are 0.

    The grid's codes are not negative: 2**(n_bits - 1) is added to codes and zero points.
    """
    if len(weight.shape) != 2:
        raise wrong(weight, "two dimensions")
    (n_out, n_in), half = weight.shape, 1 << n_bits - 1
    check_scales(scale)
    n_group = scale.shape[-1] if len(scale.shape) > 1 else 1
    table = scale.array().reshape(-1, n_group)
    if len(table) not in (1, n_out):
        raise wrong(scale, f"one row, or {n_out}")
    table, zero = np.broadcast_to(table, (n_out, n_group)), np.zeros((n_out, 1), np.float32)
    if parts.get("_zero_point") is not None:
        stored = parts.need("_zero_point", *zero_types, shape=scale.shape)
        zero = np.broadcast_to(numbers(stored.array().reshape(-1, n_group), stored.dtype), (n_out, n_group))

    def codes(first: int, end: int) -> Bytes:
        found = weight.array()[first:end]
        if n_bits < 8 and (found.min() < -half or found.max() >= half):
            raise wrong(weight, f"{-half} to {half - 1} ({n_bits} bits)", f"has codes {found.min()} to {found.max()}")
        return found.view(np.uint8) + np.uint8(half)

    def read(first: int, end: int) -> GridNumbers:
        return GridNumbers(numbers(table[first:end], scale.dtype) / np.float32(unit), zero[first:end] + half)

    int8 = type_by_name("INT8")

    def rows(first: int, end: int) -> Bytes:
        out = np.empty((end - first, n_in // int8.block_size), int8.dtype)
        out["d"], out["qs"] = read(first, end).scale, weight.array()[first:end].reshape(*out.shape, int8.block_size)
        return out.view(np.uint8)

    if n_bits == 8 and n_group == 1 and n_in % int8.block_size == 0 and not zero.any() and int8.name in parts.keep:
        return Source(name, (n_in, n_out), int8, weight.file, rows, weight.release)
    return parts.weight(name, Grid(n_out, n_bits, even_groups(n_in, n_group, scale), codes, read), weight)


def fp4(parts: Parts, weight: StoredArray) -> list[Tensor]:
    """Return the weight of NVFP4 or MXFP4.

    weight: U8[n_out, n_in / 2], the even columns in the low nibbles. "_scale": [n_out, n_in / group].
    A scale for all: "_scale_2" multiplies (modelopt), "_global_scale" divides (compressed-tensors).
    """
    scale = parts.need("_scale", "F8_E4M3", "U8", "F8_E8M0", ndim=2)
    kind = "NVFP4" if scale.dtype == "F8_E4M3" else "MXFP4"
    n_out, n_in = weight.shape[0], 2 * weight.shape[-1]
    if len(weight.shape) != 2 or (scale.shape[0], scale.shape[1] * _GROUP[kind]) != (n_out, n_in):
        raise wrong(scale, f"one scale for {_GROUP[kind]} weights of {n_in}")
    times, over = parts.get("_scale_2"), parts.get("_global_scale")
    for stored in (times, over):
        if stored is not None and (stored.dtype != "F32" or stored.data.nbytes != 4):
            raise wrong(stored, "one F32", f"is {stored.dtype} of shape {stored.shape}")
    factor = None
    if times is not None:
        factor = times.array().reshape(1)
    elif over is not None:
        factor = np.float32(1) / over.array().reshape(1)
    name = parts.base.removesuffix("_packed")
    return _fp4_tensors(parts, name, kind, weight, weight.array(), scale.array().view(np.uint8), factor)


def mxfp4_experts(parts: Parts) -> list[Tensor]:
    """Return gpt-oss's experts: _blocks U8[n_expert, n_out, n_in / 32, 16], _scales U8[n_expert, n_out, n_in / 32]."""
    blocks = parts.need("_blocks", "U8", ndim=4)
    scales = parts.need("_scales", "U8", shape=blocks.shape[:-1])
    if blocks.shape[-1] != 16:
        raise wrong(blocks, "rows of blocks of 16 bytes")
    n_expert, n_out, n_block, _ = blocks.shape
    codes = blocks.array().reshape(n_expert, n_out, 16 * n_block)
    return _fp4_tensors(parts, f"{parts.base}.weight", "MXFP4", blocks, codes, scales.array(), None)


def _fp4_tensors(
    parts: Parts, name: str, kind: str, weight: StoredArray, codes: Bytes, scale: Bytes, factor: Floats | None
) -> list[Tensor]:
    """Return the weight, and its factor if it has one and the weight stays in blocks.

    codes: U8[..., n_in / 2]. scale: U8[..., n_in / group]. factor: F32[1], of all weights.
    """
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    block, group, n_rows = type_by_name(kind), _GROUP[kind], math.prod(shape[:-1])
    codes, scale = codes.reshape(n_rows, -1), scale.reshape(n_rows, -1)
    # ggml takes no sign from a scale of NVFP4, and takes NaN for 0.
    kept = shape[-1] % block.block_size == 0 and (kind == "MXFP4" or bool((scale < 0x7F).all()))

    def nibbles(first: int, end: int) -> Bytes:
        pairs = codes[first:end].reshape(end - first, -1, group // 2)
        return np.stack((pairs & 15, pairs >> 4), axis=-1).reshape(end - first, -1, group)

    def blocks(first: int, end: int) -> Bytes:
        found, half = nibbles(first, end), group // 2
        out = np.empty((end - first, shape[-1] // block.block_size), block.dtype)
        head, qs = ("d" if kind == "NVFP4" else "e"), found[..., :half] | found[..., half:] << 4
        out[head] = scale[first:end].reshape(out[head].shape)
        out["qs"] = qs.reshape(out["qs"].shape)
        return out.view(np.uint8)

    @np.errstate(all="ignore")
    def floats(first: int, end: int) -> Floats:
        out: Floats = (codebook("e2m1") * np.float32(0.5))[nibbles(first, end)]
        out *= numbers(scale[first:end], "F8_E4M3" if kind == "NVFP4" else "U8")[..., None]
        if factor is not None:
            out *= factor
        return out.reshape(end - first, -1)

    if not kept or kind not in parts.keep:
        return [Source(name, shape[::-1], F32, weight.file, floats)]
    tensors: list[Tensor] = [Source(name, shape[::-1], block, weight.file, blocks)]
    if factor is not None:
        tensors.append(computed(f"{name.removesuffix('.weight')}.scale", factor, weight.file.path))
    return tensors
