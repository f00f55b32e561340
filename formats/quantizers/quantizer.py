"""Quantize weights to blocks of any tensor type that can be written, byte for byte as ggml does, at compiled speed."""

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import TensorType, type_by_name
from gguf_run.formats.compiler.jit import njit
from gguf_run.formats.errors import FormatError
from gguf_run.formats.quantizers.coded import CODED_QUANTIZERS
from gguf_run.formats.quantizers.encode import Quantizer
from gguf_run.formats.quantizers.fp4 import FP4_QUANTIZERS, FP4_SEARCHES
from gguf_run.formats.quantizers.k import K_QUANTIZERS
from gguf_run.formats.quantizers.legacy import LEGACY_QUANTIZERS
from gguf_run.formats.quantizers.small import SMALL_QUANTIZERS

_CHUNK = 1 << 18  # weights of a task: as f32, with their blocks, they fit into a core's own cache

QUANTIZERS: Mapping[str, Quantizer] = MappingProxyType(
    {**LEGACY_QUANTIZERS, **K_QUANTIZERS, **SMALL_QUANTIZERS, **FP4_QUANTIZERS}
)
SEARCHES: Mapping[str, Quantizer] = MappingProxyType(FP4_SEARCHES)  # smaller errors than ggml's bytes have
_EXPONENT = np.uint32(0x7F800000)  # NaN and infinity have all of these bits


@njit
def _count_bad(x: Any, found: Any) -> Any:
    """found: int64[2], becomes the number of bad values and the index of the first."""
    bits = x.view(np.uint32)
    count = 0
    for i in range(len(bits)):
        count += bits[i] & _EXPONENT == _EXPONENT
    first = 0
    while count and first < len(bits) and bits[first] & _EXPONENT != _EXPONENT:
        first += 1
    found[0], found[1] = count, first


def count_bad(x: NDArray[np.float32]) -> tuple[int, int]:
    """Count the NaN and infinite numbers in x, float32[...]. Returns (count, flat index of the first or 0)."""
    found = np.zeros(2, np.int64)
    _count_bad(np.ascontiguousarray(x).reshape(-1), found)
    count, first = found.tolist()
    return count, first


def quantize(
    array: NDArray[np.float32] | NDArray[np.float16],
    type: TensorType | str,
    importance: NDArray[np.float32] | None = None,
    n_threads: int | None = None,
    search: bool = False,
) -> NDArray[np.uint8]:
    """Quantize weights to blocks of a type, byte for byte as ggml's ggml_quantize_chunk if ggml has it.

    array: float32[..., n] or float16[..., n].
    importance: float32[n], how much an error in each column matters in all rows (llama.cpp's imatrix). None: ggml's
        choice without one. Q8_0, MXFP4, NVFP4, TQ1_0, TQ2_0, F32, F16 and BF16 do not use it.
    n_threads: the most threads to use. None: Python's choice for a pool.
    search: not ggml's bytes but the scales of least squared error, weighted by importance. Only MXFP4 and NVFP4.
    Returns uint8[..., type.row_bytes(n)], as x86-64 builds of ggml without fused multiply-add (libgguf 0.2, llama.cpp's
    prebuilt ggml-base). Scales beyond the range of f16 become infinite, as in ggml.
    FormatError if n is not whole blocks, if a weight is NaN or infinite, if importance has another shape or a number
    that is negative or not finite, if the type cannot be written.
    """
    type = type_by_name(type) if isinstance(type, str) else type
    known = SEARCHES if search else {**QUANTIZERS, **CODED_QUANTIZERS}
    if type.name not in known:
        raise FormatError(f"no {'search' if search else 'quantizer'} for {type.name}: allowed are {' '.join(known)}")
    if array.dtype not in (np.float32, np.float16) or array.ndim == 0:
        raise FormatError(f"cannot quantize {array.dtype} of shape {array.shape}: expected rows of float32 or float16")
    n = array.shape[-1]
    if n % type.block_size:
        raise FormatError(
            f"rows of {n} weights are no whole {type.name} blocks: a multiple of {type.block_size} is needed"
        )
    weights = _checked(importance, n)
    n_rows = math.prod(array.shape[:-1])
    rows = np.ascontiguousarray(array).reshape(n_rows, n)
    rows.flags.writeable = False  # one compiled version serves mapped files and arrays
    out = np.empty((n_rows, type.row_bytes(n)), np.uint8)
    step = max(1, _CHUNK // max(1, n))

    def run(start: int) -> tuple[int, int]:
        x: NDArray[Any] = rows[start : start + step].reshape(-1)
        if x.dtype == np.float16:
            x = dequantize(x.view(np.uint8), type_by_name("F16"))
            x.flags.writeable = False
        n_bad, first = count_bad(x)
        if not n_bad:
            known[type.name](x, n, weights, out[start : start + step].reshape(-1))
        return n_bad, start * n + first

    starts = range(0, n_rows if n else 0, step)
    if len(starts) > 1 and n_threads != 1:
        with ThreadPoolExecutor(n_threads) as pool:
            found = list(pool.map(run, starts))
    else:
        found = [run(start) for start in starts]
    if n_bad := sum(bad for bad, _ in found):
        first = next(first for bad, first in found if bad)
        raise FormatError(
            f"{n_bad} of {n_rows * n} weights are NaN or infinite and cannot be quantized, the first at index {first} "
            f"(row {first // n}, column {first % n})"
        )
    return out.reshape(*array.shape[:-1], out.shape[-1])


def _checked(importance: NDArray[np.float32] | None, n: int) -> NDArray[np.float32]:
    """Return the importance weights after checking them: float32[n], or float32[0] for None."""
    if importance is None:
        return np.empty(0, np.float32)
    if importance.shape != (n,):
        raise FormatError(f"importance weights have shape {importance.shape}: rows of {n} weights need ({n},)")
    weights = np.ascontiguousarray(importance, np.float32)
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        raise FormatError(
            f"{len(wrong)} of {n} importance weights are negative or not finite, the first is {weights[wrong[0]]} at "
            f"column {wrong[0]}"
        )
    return weights
