"""bitsandbytes: NF4 and FP4 (codes of 4 bits into a table), and LLM.int8 (int8 rows with a scale each).

Codes of 4 bits lie as one run over all rows, the first of two in the high nibble. A scale (absmax) belongs to a block
of the run, of 64 weights mostly. With double quantization the scales are codes of 8 bits, with a table, a scale for
each 256 of them, and one offset. Reference: bitsandbytes 0.50.
"""

import json
import math

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.coded import CODED_FORMS
from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.errors import UnsupportedError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.runtime.convert.quantized.parts import Parts, wrong
from gguf_run.runtime.convert.quantized.scaled import check_scales, int8_weight
from gguf_run.runtime.convert.stored.sources import F32, Source


def bnb_4bit(parts: Parts) -> list[Tensor]:
    """Return the weight of these tensors:

    (base)                          the codes, in any dtype
    .absmax                         F32 or, with double quantization, U8
    .quant_map                      F32[16]
    .quant_state.bitsandbytes__*    U8: JSON with the shape and the sizes of blocks
    .nested_absmax                  F32, with double quantization
    .nested_quant_map               F32[256], with double quantization
    """
    weight = parts.need("")
    table = parts.need(".quant_map", "F32", shape=(16,)).array()
    ends = {f".quant_state.bitsandbytes__{name.lower()}": type_by_name(name) for name in ("NF4", "FP4")}
    end, kind = next((pair for pair in ends.items() if parts.base + pair[0] in parts.stored), next(iter(ends.items())))
    text = parts.need(end, "U8")
    try:
        state = json.loads(text.array().tobytes())
        shape, size = tuple(int(n) for n in state["shape"]), int(state["blocksize"])
        nested_size, offset = int(state.get("nested_blocksize", 256)), np.float32(state.get("nested_offset", 0))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise wrong(text, "the JSON of a quant_state", f"says {error!r}") from None
    n = math.prod(shape)
    if len(shape) != 2 or min(shape) < 1 or min(size, nested_size) < 1 or (n + 1) // 2 != weight.data.nbytes:
        raise wrong(weight, f"half of its shape {shape} in blocks of {size}", f"has {weight.data.nbytes} bytes")
    absmax = parts.need(".absmax", "F32", "U8", shape=(-(-n // size),))
    nested = None
    if absmax.dtype == "U8":
        n_nested = -(-absmax.data.nbytes // nested_size)
        nested_table = parts.need(".nested_quant_map", "F32", shape=(256,)).array()
        nested = (nested_table, parts.need(".nested_absmax", "F32", shape=(n_nested,)).array())

    def scale(blocks: NDArray[np.int64]) -> NDArray[np.float32]:
        found = absmax.array()[blocks]
        if nested is not None:  # rounding may make the smallest ones negative
            found = nested[0][found] * nested[1][blocks // nested_size] + offset
        check_scales(absmax, found if nested is None else np.abs(found))
        return found

    def blocks(first: int, end: int) -> NDArray[np.uint8]:
        start, stop = first * shape[1], end * shape[1]
        out = np.empty((end - first, shape[1] // kind.block_size), kind.dtype)
        at = np.arange(start, stop, kind.block_size) // size
        out["d"] = scale(at).reshape(out.shape)
        out["qs"] = weight.data[start // 2 : stop // 2].reshape(out["qs"].shape)
        return out.view(np.uint8)

    @np.errstate(all="ignore")
    def read(first: int, end: int) -> NDArray[np.float32]:
        start, stop = first * shape[1], end * shape[1]
        octets = weight.data[start // 2 : (stop + 1) // 2]
        codes = np.stack((octets >> 4, octets & 15), axis=-1).reshape(-1)[start % 2 :][: stop - start]
        low, at = start // size, np.arange(start, stop) // size
        return table[codes] * scale(np.arange(low, at[-1] + 1))[at - low]

    if kind.name in parts.keep and np.array_equal(table, CODED_FORMS[kind.name].table) and not (
        shape[1] % kind.block_size or size % kind.block_size
    ):  # fmt: skip
        return [Source(parts.base, shape[::-1], kind, weight.file, blocks)]
    return [Source(parts.base, shape[::-1], F32, weight.file, read)]


def bnb_8bit(parts: Parts) -> list[Tensor]:
    """Return the weight of .weight I8[n_out, n_in] and .SCB F32[n_out]: the weight of code 127 in each row."""
    weight = parts.need(".weight", "I8", ndim=2)
    scb = parts.need(".SCB", "F32", shape=weight.shape[:1])
    layout = parts.get(".weight_format")
    if layout is not None and layout.array().any():
        raise UnsupportedError(f"{weight.file.path}: {quoted(weight.name)} lies in a GPU's order: save the model again")
    return [int8_weight(parts, weight.name, weight, scb, unit=127)]
