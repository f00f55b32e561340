"""The largest logits of a row, without a sort.

A row is surveyed once, in blocks. Then only blocks whose largest value matters are looked into. What may come is a list
of keys, int64, in the order of the ids. A key orders as its logit does and, among equal logits, by the lower id:

    bits 63..32   the logit's bits, made an int32 that orders as the number does
    bits 31..0    2^32 - 1 less the id
"""

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.compiler.jit import njit
from gguf_run.kernels_cpu.vector.lowering import simd_kernel
from gguf_run.kernels_cpu.vector.native import f32_at, i32_at
from gguf_run.kernels_cpu.vector.simd import F32, I32, Simd, Val

BLOCK = 64  # logits of a block
LOWEST = np.finfo(np.float32).min  # less than this is -inf: a token that cannot come
_LANES = 64
_LAST = (1 << 32) - 1
LEAST = -(1 << 63)  # less than all keys


def _vectors(s: Simd, x: Val, block: Val) -> list[Val]:
    return [s.load(x + block * (4 * BLOCK) + 4 * _LANES * j, F32, _LANES) for j in range(BLOCK // _LANES)]


@simd_kernel
def _survey(s: Simd, x: Val, n_blocks: Val, maxima: Val) -> Val:
    def body(block: Val, most: list[Val]) -> list[Val]:
        first, *others = _vectors(s, x, block)
        best, size = first, s.maximum(most[0], first.as_type(I32) & 0x7FFFFFFF)
        for v in others:
            best, size = s.maximum(best, v), s.maximum(size, v.as_type(I32) & 0x7FFFFFFF)
        s.store(s.fold(best, s.maximum), maxima + block * 4)
        return [size]

    return s.fold(s.loop(n_blocks, [s.const(I32, 0, _LANES)], body)[0], s.maximum).as_type(F32)


@simd_kernel(floats="divisor shift low")
def _exp_sums(s: Simd, x: Val, n_blocks: Val, divisor: Val, shift: Val, low: Val, sums: Val) -> None:
    divisors, shifts, lows = (s.splat(value, _LANES) for value in (divisor, shift, low))
    zeros = s.const(F32, 0.0, _LANES)

    def body(block: Val) -> None:
        total = zeros
        for v in _vectors(s, x, block):
            total = total + s.select(v.compare(">=", lows), s.exp(v / divisors - shifts), zeros)
        s.store(s.sum(total), sums + block * 4)

    s.each(n_blocks, body)


@njit(inline="always")
def n_blocks(n):
    """The number of blocks of n logits. The last one may be short."""
    return (n + BLOCK - 1) // BLOCK


@njit
def survey(x, n, maxima):
    """Find the largest of each block of f32[n] at x: f32[n_blocks(n)] at `maxima`.

    Return the largest of all, NaN if there is a NaN.
    """
    size, best = _survey(x, n // BLOCK, maxima), f32_at(maxima, n_blocks(n))
    if n % BLOCK:
        values, last = f32_at(x, n), np.float32(-np.inf)
        for i in range(n // BLOCK * BLOCK, n):
            last = max(last, values[i])
            if values[i] != values[i]:
                size = values[i]
        best[n // BLOCK] = last
    most = np.float32(-np.inf)
    for value in best:
        most = max(most, value)
    return most if size == size else size


@njit
def exp_sums(x, n, divisor, shift, low, sums):
    """Sum exp(value / divisor - shift) over the values of each block from `low` up: f32[n_blocks(n)] at `sums`.

    Return the sum of all, float64.
    """
    _exp_sums(x, n // BLOCK, divisor, shift, low, sums)
    each, total = f32_at(sums, n_blocks(n)), 0.0
    if n % BLOCK:
        values, rest = f32_at(x, n), np.float32(0)
        for i in range(n // BLOCK * BLOCK, n):
            rest += np.exp(values[i] / divisor - shift) if values[i] >= low else np.float32(0)
        each[n // BLOCK] = rest
    for part in each:
        total += part
    return total


@njit(inline="always")
def key_of(bits, id):
    """The key of a token whose logit has these bits. 0.0 and -0.0 are equal."""
    order = np.int64(bits)
    return (order if order >= 0 else -(1 << 31) - order) << 32 | (_LAST - id)


@njit(inline="always")
def id_of(key):
    """The id of a key's token."""
    return _LAST - (key & _LAST)


def ids_in_order(keys: NDArray[np.int64]) -> list[int]:
    """Return the ids of keys, the largest logit first. LEAST is no key."""
    return [_LAST - (key & _LAST) for key in sorted(keys.tolist(), reverse=True) if key > LEAST]


@njit
def gather(x, n, maxima, low, high, most, keys):
    """List the logits from `low` up to below `high`, but end behind the block with which there are more than `most`.

    keys: room for n + 1. Return how many there are.
    """
    values, bits, best = f32_at(x, n), i32_at(x, n), f32_at(maxima, n_blocks(n))
    count = 0
    for block in range(len(best)):
        if best[block] >= low and count <= most:
            for i in range(block * BLOCK, min(n, (block + 1) * BLOCK)):
                keys[count] = key_of(bits[i], i)
                count += (values[i] >= low) & (values[i] < high)
    return count


@njit
def greatest(x, n, maxima, k, keys, work, weights):
    """List the k largest logits, fewer if the others are -inf. Overwrites work and weights. Return how many there are.

    As many blocks have a maximum of at least the k-th largest maximum: no smaller logit is among the k largest.
    """
    low, blocks = np.float32(LOWEST), n_blocks(n)
    if k < blocks:
        bits = i32_at(maxima, blocks)
        for block in range(blocks):
            work[block], weights[block] = key_of(bits[block], block), 1.0
        low = max(low, f32_at(maxima, blocks)[id_of(reach(work, weights, blocks, float(k)))])
    count = gather(x, n, maxima, low, np.float32(np.inf), n, keys)
    if count <= k:
        return count
    for i in range(count):
        work[i], weights[i] = keys[i], 1.0
    return keep(keys, count, reach(work, weights, count, float(k)))


@njit
def reach(keys, weights, n, wanted):
    """Return the largest key such that the weights of the keys from it up reach `wanted`; if all do not, the smallest.

    Halves the range in which this key lies. Overwrites keys and weights: those in the range move to the front.
    """
    low = high = keys[0]
    for i in range(n):
        low, high = min(low, keys[i]), max(high, keys[i])
    while low < high:
        middle = (low >> 1) + (high >> 1) + (low & high & 1) + 1  # low + high may be too large for an int64
        weight = 0.0
        for i in range(n):
            if keys[i] >= middle:
                weight += weights[i]
        is_above = weight >= wanted
        if is_above:
            low = middle
        else:
            high = middle - 1
            wanted -= weight
        left = 0
        for i in range(n):
            key, weight = keys[i], weights[i]
            keys[left], weights[left] = key, weight
            left += (key >= middle) == is_above
        n = left
    return low


@njit
def keep(keys, n, lowest):
    """Keep the keys from `lowest` up, in their order. Return how many there are."""
    left = 0
    for i in range(n):
        key = keys[i]
        keys[left] = key
        left += key >= lowest
    return left
