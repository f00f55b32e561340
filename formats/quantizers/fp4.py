"""Quantizers of MXFP4 and NVFP4, whose weights are floats of four bits (e2m1): ggml's, and others that search scales.

ggml takes the scale from the largest magnitude of a group, whatever that costs the others, and uses no importance
weights. A search tries the scales around that one, and keeps the one of the least squared error.
formats/blocks/unpack_small.py draws the layouts.
"""

from typing import Any

import numpy as np

from gguf_run.formats.blocks.types import CODEBOOKS
from gguf_run.formats.compiler.jit import clone, njit
from gguf_run.formats.quantizers.encode import block_quantizers
from gguf_run.formats.quantizers.lanes import (
    LANES,
    bits,
    f32,
    fabs,
    from_bits,
    numbers,
    offset,
    to_float,
    to_int,
    where,
)
from gguf_run.formats.quantizers.pack import put, put_nibbles
from gguf_run.formats.quantizers.search import largest

_F = np.float32
_E2M1 = tuple(_F(v) for v in CODEBOOKS["e2m1"][:8])  # times 2, as in the grid
BELOW = ABOVE = 0  # placeholders: `clone` replaces them by how many codes of scales are tried below and above ggml's


@njit(forceinline=True)
def _nearest(x: Any, d: Any) -> Any:
    """The code, without its sign, of the number that is nearest to |x| in units of d, and its distance."""
    code, best = to_int(f32(0)), fabs(x)
    for k, value in enumerate(_E2M1):
        distance = fabs(value * d - fabs(x))
        code, best = where(distance < best, k, code), where(distance < best, distance, best)
    return code, best


@njit(forceinline=True)
def _error(x: Any, importance: Any, n: Any, d: Any, weighted: Any) -> Any:
    """The sum of the squared errors of n weights with scale d."""
    total = f32(0)
    for i in range(n):
        distance = _nearest(x[i], d)[1]
        total += distance * distance * (importance[i] if weighted else f32(1))
    return total


@njit(forceinline=True)
def _put_e2m1(block: Any, at: Any, n: Any, x: Any, d: Any, q: Any) -> None:
    """n / 2 bytes from `at` on = the codes of n weights. A zero has no sign."""
    for i in range(n):
        code = _nearest(x[i], d)[0]
        q[i] = to_float(where((x[i] < 0) & (code > 0), code + 8, code))
    put_nibbles(block, at, n // 2, q, 0)


@njit(forceinline=True)
def _e8m0(e: Any) -> Any:
    """Half of 2**(e - 127)."""
    return from_bits(where(e < 2, to_int(f32(0x00200000)) << e, (e - 1) << 23))


@njit(forceinline=True)
def _ue4m3(code: Any) -> Any:
    """Half of the float e4m3 of a code below 0x7F."""
    return where(code < 8, to_float(code) * _F(2.0**-10), from_bits((code + (119 << 3)) << 20))


@njit(forceinline=True)
def _ue4m3_code(v: Any) -> Any:
    """The code of v >= 0: halves go up. ggml makes 7 of subnormals that round to 8, and 448 of all from 248 on."""
    subnormal = to_int(where(v < 1, v, 0) * 512 + _F(0.5))
    subnormal = where(subnormal > 7, 7, subnormal)
    code = ((bits(v) + (1 << 19)) >> 20) - (120 << 3)
    return where(v < _F(2.0**-6), subnormal, where(code >= 0x78, 0x7E, code))


def _encode_mxfp4(x: Any, importance: Any, q: Any, block: Any, weighted: Any) -> None:
    """e u8, the exponent of the largest magnitude less 2 | qs u8[16].

    ggml rounds log2 to f32 before it takes the floor: a magnitude just below a power of two counts as that power. ggml
    stores the low byte of exponents that are too small for e.
    """
    q[0] = largest(x, 32)[1]
    magnitudes = numbers(q)
    for lane in range(LANES):
        magnitude = magnitudes[lane]
        log2 = np.floor(_F(np.log2(np.float64(magnitude)))) if magnitude > 0 else _F(-125)
        magnitudes[lane] = log2 + _F(125)
    first = to_int(q[0]) & 255
    e = first
    if BELOW + ABOVE:
        best = _error(x, importance, 32, _e8m0(e), weighted)
        for k in range(-BELOW, ABOVE + 1):
            trial = where((first + k >= 0) & (first + k <= 254), first + k, first)
            error = _error(x, importance, 32, _e8m0(trial), weighted)
            e, best = where(error < best, trial, e), where(error < best, error, best)
    put(block, 0, e)
    _put_e2m1(block, 1, 32, x, _e8m0(e), q)


def _encode_nvfp4(x: Any, importance: Any, q: Any, block: Any, weighted: Any) -> None:
    """d u8[4], with which the largest magnitude of 16 weights becomes 6 | qs u8[32]."""
    for g in range(4):
        x_g, w_g = offset(x, 16 * g), offset(importance, 16 * g)
        first = _ue4m3_code(largest(x_g, 16)[1] / _F(6))
        code = first
        if BELOW + ABOVE:
            best = _error(x_g, w_g, 16, _ue4m3(code), weighted)
            for k in range(-BELOW, ABOVE + 1):
                trial = where((first + k >= 0) & (first + k <= 0x7E), first + k, first)
                error = _error(x_g, w_g, 16, _ue4m3(trial), weighted)
                code, best = where(error < best, trial, code), where(error < best, error, best)
        put(block, g, code)
        _put_e2m1(block, 4 + 8 * g, 16, x_g, _ue4m3(code), q)


def _encoders(name: str, mxfp4: tuple[int, int], nvfp4: tuple[int, int]) -> dict[str, Any]:
    rows = (("MXFP4", _encode_mxfp4, mxfp4), ("NVFP4", _encode_nvfp4, nvfp4))
    return {
        type: njit(clone(encode, name, BELOW=below, ABOVE=above), inline="always")
        for type, encode, (below, above) in rows
    }


FP4_QUANTIZERS = block_quantizers(**_encoders("reference", (0, 0), (0, 0)))
FP4_SEARCHES = block_quantizers("search", **_encoders("search", (1, 1), (6, 6)))
