"""Random draws. A number depends on (seed, position, stream) alone: batches and speculation give the same text."""

import math

import numpy as np

from gguf_run.formats.compiler.jit import njit
from gguf_run.kernels_cpu.sampling.narrow import BLOCK, LOWEST, exp_sums, gather, id_of, n_blocks
from gguf_run.kernels_cpu.vector.native import f32_at

EXACT = 4096  # up to so many weights are float64, as in runtime/sampling
_ROUNDS = 24


@njit
def uniform(seed, position, stream):
    """What candidates.uniform of runtime/sampling returns, bit for bit. Arguments: the same 64 bits, as int64."""
    mask = 0xFFFFFFFF
    a, b, c, d = position & mask, (position >> 32) & mask, stream & mask, (stream >> 32) & mask
    key, key2 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57  # an int64 has the low 64 bits of the product, which are all
        a, b, c, d = ((q >> 32) & mask) ^ b ^ key, q & mask, ((p >> 32) & mask) ^ d ^ key2, p & mask
        key, key2 = (key + 0x9E3779B9) & mask, (key2 + 0xBB67AE85) & mask
    return ((a << 21) | (b >> 11)) / (1 << 53)


@njit
def weigh(x, n_vocab, keys, n, low, temperature, most, weights):
    """weights float64[n] = exp((logit - most) / temperature) of n keys, 0 for logits below `low`. Return their sum."""
    values, shift, total = f32_at(x, n_vocab), np.float64(most / temperature), 0.0
    for i in range(n):
        value = values[id_of(keys[i])]
        weights[i] = math.exp(np.float64(value / temperature) - shift) if value >= low else 0.0
        total += weights[i]
    return total


@njit
def near_end(x, n, maxima, most, top_p, total, sums, keys):
    """List logits among which the fewest largest ones end that have the probability top_p together.

    The range from `low` up to below `high`, in which they are, is halved until few are in it. total: the sum of all
    weights. Return how many there are, and the weights of all larger ones together.
    """
    # All logits below this one have less than 1 - top_p together. The rest is for rounding.
    low = max(np.float32(LOWEST), most + np.float32(math.log((1 - top_p) * total / n) - 1))
    high, above, held = np.float32(np.inf), 0.0, total  # held: the sum from `low` up
    for _ in range(_ROUNDS):
        middle = low + (min(high, most) - low) / np.float32(2)
        mass = exp_sums(x, n, np.float32(1), most, middle, sums)
        if mass >= top_p * total:
            low, held = middle, mass
        else:
            high, above = middle, mass
        if held - above < EXACT * math.exp(low - most):  # none weighs less
            break
    return gather(x, n, maxima, low, high, n, keys), above


@njit
def drop(x, n, low, last, target):
    """Copy the logits to `target`, with -inf for those below `low`, and for equals of that of id `last` behind it.

    last: n if there is no such id.
    """
    values, kept = f32_at(x, n), f32_at(target, n)
    for i in range(n):
        kept[i] = values[i] if values[i] >= low else np.float32(-np.inf)
    if last < n:
        equal = values[last]
        for i in range(last + 1, n):
            if values[i] == equal:
                kept[i] = -np.inf


@njit
def draw_of(keys, n, weights, wanted):
    """Return the id of the first key such that the weights up to it exceed `wanted`."""
    sum, best = 0.0, 0
    for i in range(n):
        sum += weights[i]
        if sum > wanted:
            return id_of(keys[i])
        if weights[i] > weights[best]:
            best = i
    return id_of(keys[best])  # rounding leads behind the end


@njit
def draw_of_all(x, n_vocab, temperature, most, number, sums):
    """Draw one of all tokens by their weights. First a block is drawn, then one of its tokens. number: in [0, 1)."""
    shift = np.float32(most / temperature)
    total = exp_sums(x, n_vocab, temperature, shift, np.float32(LOWEST), sums)
    values, each = f32_at(x, n_vocab), f32_at(sums, n_blocks(n_vocab))
    wanted, sum, block = number * total, 0.0, 0
    while block < len(each) - 1 and sum + each[block] <= wanted:
        sum += each[block]
        block += 1
    best = block * BLOCK
    for id in range(block * BLOCK, min(n_vocab, (block + 1) * BLOCK)):
        sum += math.exp(np.float64(values[id] / temperature - shift))
        if sum > wanted:
            return id
        if values[id] > values[best]:
            best = id
    return best  # rounding leads behind the block
