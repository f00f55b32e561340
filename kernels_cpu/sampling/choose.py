"""An op that chooses the next token of each row: biases, mask, penalties, top-k, top-p, min-p, temperature, draw.

It does what runtime/sampling does for one row with NumPy. Each row is a piece of its own, so no row depends on others.
"""

import math

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.compiler.deferred import COMPILING
from gguf_run.formats.compiler.jit import carray, njit
from gguf_run.kernels_cpu.replay.op import op
from gguf_run.kernels_cpu.replay.team import Team
from gguf_run.kernels_cpu.sampling.narrow import BLOCK, LOWEST

if COMPILING:
    from gguf_run.kernels_cpu.sampling.narrow import cut, sum_blocks, survey
    from gguf_run.kernels_cpu.vector.native import f32_at, f64_at, i32_at, i64_at, pointer

BAD = -1  # in place of an id: the logits are no numbers, or no token may come
HIGHEST = np.float32(1e37)  # the largest logit that a penalty leaves

ROW = np.dtype(
    [
        (name, "i8")
        for name in (
            "logits",  # address of f32[n_vocab]
            "mask",  # address of uint32[n_vocab / 32]: a bit for each token that may come; 0: all may
            "bias_ids",  # address of int64[n_bias]
            "biases",  # address of float64[n_bias], of these tokens
            "n_bias",
            "recent",  # address of int32[n_recent], each at most n_vocab: the tokens that penalties look at
            "n_recent",
            "seed",  # the 64 bits
            "position",
            "top_k",  # 0: off; 1: the most likely token
            "is_summed",  # whether log_sum is wanted
            "id",  # result: the chosen token, BAD if the row has no choice
        )
    ]
    + [
        (name, "f8")
        for name in (
            "top_p",  # 1: off
            "log_min_p",  # -inf: off
            "temperature",
            "repeat_penalty",
            "frequency_penalty",
            "presence_penalty",
            "log_sum",  # result: log(sum(exp(logits)))
        )
    ]
)


class RowChooser:
    """Chooses tokens on the threads of a team."""

    def __init__(self, team: Team, n_vocab: int) -> None:
        self._team, nth, n_blocks = team, team.n_threads, n_vocab // BLOCK + 1
        self._address = choose.compiled.address  # compiled now, if it never was: a step would wait for it
        self._scratch: dict[str, NDArray[np.generic]] = {
            "x": np.zeros((nth, n_blocks * BLOCK), np.float32),  # the row, as it changes
            "keys": np.zeros((nth, n_blocks * BLOCK), np.int64),  # see narrow.py
            "weights": np.zeros((nth, n_blocks * BLOCK)),
            "maxima": np.zeros((nth, n_blocks), np.float32),
            "sums": np.zeros((nth, n_blocks)),
        }

    def run(self, rows: NDArray[np.void], n_vocab: int) -> None:
        """Choose a token for each of ROW[n]. n_vocab: logits of each, at most those of __init__."""
        places = {name: array.ctypes.data for name, array in self._scratch.items()}
        arguments = choose.bind(n_rows=len(rows), rows=rows.ctypes.data, n_vocab=n_vocab, **places)
        self._team.run(np.array([[self._address, arguments.ctypes.data]], np.int64))


@op("n_rows rows n_vocab x keys weights maxima sums")
def choose(args, piece, ith, nth):
    a = carray(args, 1)[0]
    if piece < 0:
        return a.n_rows
    row, n_blocks = carray(pointer(a.rows), a.n_rows, ROW)[piece], a.n_vocab // BLOCK + 1
    room = n_blocks * BLOCK
    x, maxima = a.x + 4 * ith * room, a.maxima + 4 * ith * n_blocks
    values, best, old = f32_at(x, room), f32_at(maxima, n_blocks), f32_at(row.logits, a.n_vocab)
    keys, weights = i64_at(a.keys + 8 * ith * room, room), f64_at(a.weights + 8 * ith * room, room)
    sums = f64_at(a.sums + 8 * ith * n_blocks, n_blocks)
    row.id = BAD
    for i in range(a.n_vocab):
        values[i] = old[i]
    for i in range(a.n_vocab, room):
        values[i] = -np.inf
    most, lowest = survey(x, maxima, best), np.float32(LOWEST)
    if row.is_summed and abs(most) < np.inf:
        row.log_sum = most + math.log(sum_blocks(x, values, best, most, 1.0, lowest, sums))
    if (row.n_bias or row.n_recent or row.mask) and abs(most) < np.inf:
        _change(row, a.n_vocab, values, keys)
        most = survey(x, maxima, best)
    if abs(most) < np.inf:
        low = lowest
        if row.top_k:
            low = cut(x, values, best, most, np.inf, low, float(row.top_k), sums, keys, weights)
        if row.top_p < 1:
            total = sum_blocks(x, values, best, most, 1.0, low, sums)
            # All logits below this one have less than 1 - top_p together. The 1 is for rounding.
            low = max(low, most + np.float32(math.log((1 - row.top_p) * total / room) - 1))
            low = cut(x, values, best, most, 1.0, low, row.top_p * total, sums, keys, weights)
        low = max(low, most + np.float32(row.log_min_p))
        total = sum_blocks(x, values, best, most, row.temperature, low, sums)
        row.id = _draw(values, sums, most, row.temperature, low, uniform(row.seed, row.position, np.int64(0)) * total)
    return 0


@njit
def _change(row, n_vocab, values, counts):
    """Add the biases, forbid what is masked, penalize recent tokens. counts: int64[len(values)], for use here."""
    bias_ids, biases = i64_at(row.bias_ids, row.n_bias), f64_at(row.biases, row.n_bias)
    for i in range(row.n_bias):
        values[bias_ids[i]] += np.float32(biases[i])
    if row.mask:
        mask = i32_at(row.mask, (n_vocab + 31) // 32)
        for word in range(len(mask)):
            for i in range(32 * word, 32 * word + 32):
                if not (mask[word] >> (i & 31)) & 1:
                    values[i] = -np.inf
    recent = i32_at(row.recent, row.n_recent)
    for id in recent:
        counts[id] = 0
    for id in recent:
        counts[id] += 1
    repeat, presence = np.float32(row.repeat_penalty), np.float32(row.presence_penalty)
    for id in recent:
        value = values[id]
        if counts[id] and value > -np.inf:
            value = value / repeat if value > 0 else value * repeat
            value -= np.float32(counts[id]) * np.float32(row.frequency_penalty) + presence
            values[id] = value if abs(value) <= HIGHEST else math.copysign(HIGHEST, value)
        counts[id] = 0


@njit
def _draw(values, sums, most, temperature, low, wanted):
    """Draw a token: the first one such that the weights up to it exceed `wanted`. The sums of blocks lead to it."""
    sum, block, chosen = 0.0, 0, BAD
    while sum + sums[block] <= wanted:
        sum += sums[block]
        block += 1
    for id in range(block * BLOCK, (block + 1) * BLOCK):
        weight = math.exp((np.float64(values[id]) - most) / temperature) if values[id] >= low else 0.0
        if weight > 0 and sum <= wanted:  # rounding may lead behind the last one
            chosen = id
            sum += weight
    return chosen


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
