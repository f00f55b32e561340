"""A row of logits, without a sort: where its largest ones end, and how its weights add up.

A row is surveyed once, in blocks. Then only blocks whose largest logit matters are looked into. Logits are ordered by
keys, int64. A key orders as its logit does and, among equal logits, by the lower id:

    bits 63..32   the logit's bits, made an int32 that orders as the number does
    bits 31..0    2^32 - 1 less the id

The weight of a logit is exp((logit - most) / temperature). most: the largest logit.
"""

import math

import numpy as np

from gguf_run.formats.compiler.jit import njit
from gguf_run.kernels_cpu.vector.lowering import simd_kernel
from gguf_run.kernels_cpu.vector.simd import F32, I32, Simd, Val

BLOCK = 64  # logits of a block. A row is filled up with -inf.
LOWEST = np.finfo(np.float32).min  # less than this is -inf: a token that cannot come
EXACT = 4096  # weights of up to so many logits are float64, as in runtime/sampling
_ROUNDS = 8  # by which the range shrinks to 1/256
_LAST = (1 << 32) - 1
_LEAST = -(1 << 63)  # less than all keys


@simd_kernel
def _survey(s: Simd, x: Val, n_blocks: Val, maxima: Val) -> Val:
    def body(block: Val, size: list[Val]) -> list[Val]:
        v = s.load(x + block * (4 * BLOCK), F32, BLOCK)
        s.store(s.fold(v, s.maximum), maxima + block * 4)
        return [s.maximum(size[0], v.as_type(I32) & 0x7FFFFFFF)]

    return s.fold(s.loop(n_blocks, [s.const(I32, 0, BLOCK)], body)[0], s.maximum).as_type(F32)


@simd_kernel(floats="most temperature low")
def _sum_of_block(s: Simd, x: Val, most: Val, temperature: Val, low: Val) -> Val:
    v = s.load(x, F32, BLOCK)
    weights = s.exp((v - s.splat(most, BLOCK)) / s.splat(temperature, BLOCK))
    return s.sum(s.select(v.compare(">=", s.splat(low, BLOCK)), weights, s.const(F32, 0.0, BLOCK)))


@njit
def survey(x, maxima, best):
    """Find the largest logit of each block of the row at address x: float32[n_blocks].

    maxima: the address of best. Return the largest of all, NaN if there is a NaN.
    """
    most = _survey(x, len(best), maxima)  # the largest size
    if most == most:
        most = np.float32(-np.inf)
        for value in best:
            if value > most:
                most = value
    return most


@njit
def sum_blocks(x, values, best, most, temperature, low, sums):
    """Sum the weights of the logits of each block from `low` up: float64[n_blocks]. Return the sum of all.

    values: the row at address x.
    """
    total, n_likely = 0.0, 0
    for value in best:
        n_likely += value >= low
    is_exact = len(best) <= EXACT // BLOCK + 1 or (low > LOWEST and n_likely <= EXACT // 2)
    for block in range(len(best)):
        sum = 0.0
        if best[block] >= low and is_exact:
            for i in range(block * BLOCK, (block + 1) * BLOCK):
                if values[i] >= low:
                    sum += math.exp((np.float64(values[i]) - most) / temperature)
        elif best[block] >= low:
            sum = np.float64(_sum_of_block(x + 4 * BLOCK * block, most, np.float32(temperature), low))
        sums[block] = sum
        total += sum
    return total


@njit
def cut(x, values, best, most, temperature, low, wanted, sums, keys, weights):
    """Find the fewest largest logits, of those from `low` up, whose weights together reach `wanted`.

    Return the smallest of them. The others that equal it become -inf. Overwrites sums, keys, weights.
    """
    high, above, none = most, 0.0, np.int64(0)
    # The maxima are some of the logits. If they reach `wanted`, no logit is needed that is less than their last.
    end = _reach(keys, weights, _list(best, none, len(best), most, temperature, low, high, keys, weights, none), wanted)
    if end > _LEAST:
        low = best[_LAST - (end & _LAST)]
    elif temperature < np.inf:
        for _ in range(_ROUNDS):
            middle = low + (high - low) / np.float32(2)
            sum = sum_blocks(x, values, best, most, temperature, middle, sums)
            if sum >= wanted:
                low = middle
            else:
                high, above = middle, sum
    count = none
    for block in range(len(best)):
        if best[block] >= low:
            first = block * BLOCK
            count = _list(values, first, first + BLOCK, most, temperature, low, high, keys, weights, count)
    end = _reach(keys, weights, count, wanted - above)
    if end > _LEAST:
        last = _LAST - (end & _LAST)
        low = values[last]
        for block in range(last // BLOCK, len(best)):
            if best[block] >= low:
                for i in range(block * BLOCK, (block + 1) * BLOCK):
                    if values[i] == low and i > last:
                        values[i] = -np.inf
    return low


@njit
def _list(values, first, end, most, temperature, low, high, keys, weights, count):
    """Append keys and weights of the logits first..end - 1 from `low` up to `high`. Return the new count."""
    for i in range(first, end):
        if low <= values[i] <= high:
            order = np.int64(np.float32(values[i]).view(np.int32))  # that of -0.0 becomes the 0 of 0.0
            keys[count] = (order if order >= 0 else -(1 << 31) - order) << 32 | (_LAST - i)
            weights[count] = math.exp((np.float64(values[i]) - most) / temperature) if temperature < np.inf else 1.0
            count += 1
    return count


@njit
def _reach(keys, weights, n, wanted):
    """Return the largest key such that the weights of the keys from it up reach `wanted`; _LEAST if all do not.

    Halves the range in which this key lies. Overwrites keys and weights: those in the range move to the front.
    """
    low = high = _LEAST
    for i in range(n):
        if keys[i] > high:
            high = keys[i]
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
