"""Quantizers of Q4_0 Q4_1 Q5_0 Q5_1 Q8_0, byte for byte as ggml's reference.

formats/blocks/unpack_legacy.py draws the layouts.

Without importance weights, the largest weight of a block (or the largest and the smallest) gives the scale. With them,
the searches of the K-quants find it. Q8_0 does not use importance weights.
"""

from typing import Any

import numpy as np

from gguf_run.formats.compiler.jit import clone, njit
from gguf_run.formats.quantizers.encode import block_quantizers, cut, roundf
from gguf_run.formats.quantizers.lanes import scratch_f32, to_float, to_int, where
from gguf_run.formats.quantizers.pack import half, put, put_half, put_nibbles
from gguf_run.formats.quantizers.search import largest, search_min, search_signed, weigh

_F = np.float32
BITS = 0  # a placeholder: `clone` replaces it


@njit(forceinline=True)
def _put_quants(block: Any, at: Any, q: Any, bits: Any) -> None:
    """qh u32 (the fifth bits, if bits is 5) | qs u8[16]."""
    if bits == 5:
        for c in range(4):
            byte = to_int(q[8 * c]) >> 4
            for i in range(1, 8):
                byte = byte | (to_int(q[8 * c + i]) >> 4) << i
            put(block, at + c, byte)
        at += 4
    put_nibbles(block, at, 16, q, 0)


def _encode_scale(x: Any, importance: Any, mean: Any, q: Any, block: Any, weighted: Any) -> None:
    """Q4_0, Q5_0: d f16 | quants; weight = d * (q - nmax)."""
    nmax = _F(1 << BITS - 1)
    if weighted:
        w = scratch_f32(32)
        weigh(x, importance, w, 32, mean)
        d = search_signed(x, w, q, 32, nmax)
    else:
        d = largest(x, 32)[0] / -nmax
        inverse = where(d == 0, 0, 1 / d)
        for i in range(32):
            level = to_float(cut(x[i] * inverse + (nmax + _F(0.5))))
            q[i] = where(level < 2 * nmax - 1, level, 2 * nmax - 1)
    put_half(block, 0, half(d))
    _put_quants(block, 2, q, BITS)


def _encode_minimum(x: Any, importance: Any, mean: Any, q: Any, block: Any, weighted: Any) -> None:
    """Q4_1, Q5_1: d f16 | m f16 | quants; weight = d * q + m."""
    nmax = _F((1 << BITS) - 1)
    if weighted:
        w = scratch_f32(32)
        weigh(x, importance, w, 32, mean)
        d, minimum = search_min(x, w, q, 32, nmax, _F(-0.9), _F(0.05), 36, False)
        low = minimum * _F(-1)
    else:
        low, high = x[0], x[0]
        for i in range(1, 32):
            low = where(x[i] < low, x[i], low)
            high = where(x[i] > high, x[i], high)
        d = (high - low) / nmax
        inverse = where(d == 0, 0, 1 / d)
        for i in range(32):
            level = to_float(cut((x[i] - low) * inverse + _F(0.5)))
            q[i] = where(level < nmax, level, nmax)
    put_half(block, 0, half(d))
    put_half(block, 2, half(low))
    _put_quants(block, 4, q, BITS)


@njit(inline="always")
def _encode_q8_0(x: Any, importance: Any, q: Any, block: Any, weighted: Any) -> None:
    """d f16 | qs i8[32]. The largest magnitude becomes 127."""
    d = largest(x, 32)[1] / _F(127)
    inverse = where(d == 0, 0, 1 / d)
    put_half(block, 0, half(d))
    for i in range(32):
        put(block, 2 + i, roundf(x[i] * inverse))


_ENCODERS = {
    name: njit(clone(encode, name, BITS=int(name[1])), inline="always")
    for encode, names in ((_encode_scale, ("Q4_0", "Q5_0")), (_encode_minimum, ("Q4_1", "Q5_1")))
    for name in names
}
LEGACY_QUANTIZERS = block_quantizers(needs_mean=True, **_ENCODERS) | block_quantizers(Q8_0=_encode_q8_0)
