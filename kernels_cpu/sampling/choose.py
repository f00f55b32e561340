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
from gguf_run.kernels_cpu.sampling.narrow import BLOCK, LEAST

if COMPILING:
    from gguf_run.kernels_cpu.sampling.draw import EXACT, draw_of, draw_of_all, drop, near_end, uniform, weigh
    from gguf_run.kernels_cpu.sampling.narrow import (
        LOWEST,
        exp_sums,
        gather,
        greatest,
        id_of,
        keep,
        reach,
        survey,
    )
    from gguf_run.kernels_cpu.vector.native import f32_at, i32_at, i64_at, pointer

MOST_TOP = 64  # the most tokens whose log-probabilities are wanted
BAD = -1  # in place of an id: the logits are no numbers, or no token may come
HIGHEST = np.float32(1e37)  # the largest logit that a penalty leaves
_FEW = 512  # largest logits, among which top-p mostly ends

BIAS = np.dtype([("id", "i8"), ("bias", "f8")])
ROW = np.dtype(
    [
        (name, "i8")
        for name in (
            "logits",  # address of f32[n_vocab]
            "mask",  # address of uint32[n_vocab / 32]: a bit for each token that may come; 0: all may
            "biases",  # address of BIAS[n_bias]
            "n_bias",
            "recent",  # address of int32[n_recent]: the tokens that penalties look at
            "n_recent",
            "seed",  # the 64 bits
            "position",
            "top_k",  # 0: off; 1: the most likely token
            "n_top",  # so many tokens' log-probabilities are wanted; -1: none, not even that of the chosen token
        )
    ]
    # log_min_p: -inf is off. top_p: 1 is off.
    + [
        (name, "f8")
        for name in ("top_p", "log_min_p", "temperature", "repeat_penalty", "frequency_penalty", "presence_penalty")
    ]
)


class RowChooser:
    """Chooses tokens on the threads of a team."""

    def __init__(self, team: Team, n_vocab: int) -> None:
        self._team, self._n_vocab, self._room = team, n_vocab, n_vocab // BLOCK * BLOCK + BLOCK
        self._scratch = np.zeros((team.n_threads, 4 * self._room + self._room // BLOCK), np.int64)  # see choose

    def run(self, rows: NDArray[np.void]) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
        """Choose a token for each of ROW[n]. Return three arrays:

        ids int64[n]: BAD where a row has no choice.
        log_sums float64[n]: log(sum(exp(logits))) of rows with n_top >= 0.
        tops int64[n, MOST_TOP]: the keys of the n_top largest logits, in the order of their ids; then -2^63.
        """
        n = len(rows)
        ids, log_sums, tops = np.empty(n, np.int64), np.empty(n), np.full((n, MOST_TOP), LEAST, np.int64)
        places = {"rows": rows, "ids": ids, "log_sums": log_sums, "tops": tops, "scratch": self._scratch}
        addresses = {name: array.ctypes.data for name, array in places.items()}
        arguments = choose.bind(n_rows=n, n_vocab=self._n_vocab, room=self._room, **addresses)
        self._team.run(np.array([[choose.compiled.address, arguments.ctypes.data]], np.int64))
        return ids, log_sums, tops


@op("n_rows rows n_vocab ids log_sums tops scratch room")
def choose(args, piece, ith, nth):
    a = carray(args, 1)[0]
    if piece < 0:
        return a.n_rows
    row, n, room = carray(pointer(a.rows), a.n_rows, ROW)[piece], a.n_vocab, a.room
    # 32 bytes for each token: keys, keys, weights, changed logits, counts. Then two numbers for each block.
    base = a.scratch + ith * (32 * room + 8 * (room // BLOCK))
    keys, work = i64_at(base, room), i64_at(base + 8 * room, room)
    weights, changed = carray(pointer(base + 16 * room), room, np.float64), base + 24 * room
    maxima, sums = base + 32 * room, base + 32 * room + 4 * (room // BLOCK)
    id, x = BAD, row.logits
    most = survey(x, n, maxima)
    if row.n_top >= 0 and abs(most) < np.inf:
        total = exp_sums(x, n, np.float32(1), most, np.float32(LOWEST), sums)
        carray(pointer(a.log_sums), a.n_rows, np.float64)[piece] = most + math.log(total)
        if row.n_top:
            tops = i64_at(a.tops + 8 * MOST_TOP * piece, MOST_TOP)
            for i in range(greatest(x, n, maxima, row.n_top, keys, work, weights)):
                tops[i] = keys[i]
    if abs(most) < np.inf and (row.n_bias or row.n_recent or row.mask):
        _change(row, n, changed, i32_at(base + 28 * room, room))
        x = changed
        most = survey(x, n, maxima)
    if abs(most) < np.inf:
        id = _drawn(row, x, n, maxima, most, changed, sums, keys, work, weights)
    i64_at(a.ids, a.n_rows)[piece] = id
    return 0


@njit
def _drawn(row, x, n, maxima, most, changed, sums, keys, work, weights):
    """Draw one of the tokens that top-k, top-p and min-p leave."""
    one, lowest, number = np.float32(1), np.float32(LOWEST), uniform(row.seed, row.position, np.int64(0))
    temperature = np.float32(row.temperature)
    if not abs(most / temperature) < np.inf:  # logits so far apart that the temperature changes nothing
        temperature = one
    low, bound, count = max(lowest, most + np.float32(row.log_min_p)), np.int64(LEAST), np.int64(0)
    few = row.top_k
    if not few and row.top_p < 1:
        few = min(_FEW, n // BLOCK // 2) if n > EXACT else n
    if few:
        count = greatest(x, n, maxima, few, keys, work, weights)
    if row.top_p < 1:
        mass = weigh(x, n, keys, count, lowest, one, most, weights)
        total = mass if row.top_k or n <= EXACT else exp_sums(x, n, one, most, lowest, sums)
        wanted, is_among = row.top_p * total, mass >= row.top_p * total
        if not is_among:
            count, above = near_end(x, n, maxima, most, row.top_p, total, sums, keys)
            weigh(x, n, keys, count, lowest, one, most, weights)
            wanted -= above
        for i in range(count):
            work[i] = keys[i]
        bound = reach(work, weights, count, wanted)
        if not is_among:
            few, low = 0, max(low, f32_at(x, n)[id_of(bound)])
    if not few:
        count = gather(x, n, maxima, low, np.float32(np.inf), np.int64(EXACT), keys)
        if count > EXACT:
            if low > lowest:
                drop(x, n, low, id_of(bound) if bound > LEAST else n, changed)
                x = changed
            return draw_of_all(x, n, temperature, most, number, sums)
    count = keep(keys, count, bound)
    total = weigh(x, n, keys, count, low, temperature, most, weights)
    return draw_of(keys, count, weights, number * total)


@njit
def _change(row, n, target, counts):
    """Copy the logits to `target` with biases, mask and penalties. counts: int32[n], 0 before and after."""
    values, old = f32_at(target, n), f32_at(row.logits, n)
    for i in range(n):
        values[i] = old[i]
    biases = carray(pointer(row.biases), row.n_bias, BIAS)
    for i in range(row.n_bias):
        values[biases[i].id] += np.float32(biases[i].bias)
    if row.mask:
        mask = i32_at(row.mask, (n + 31) // 32)
        for word in range(len(mask)):
            if mask[word] != -1:
                for i in range(32 * word, min(n, 32 * word + 32)):
                    if not (mask[word] >> (i & 31)) & 1:
                        values[i] = -np.inf
    recent = i32_at(row.recent, row.n_recent)
    for id in recent:
        if id < n:
            counts[id] += 1
    repeat, presence = np.float32(row.repeat_penalty), np.float32(row.presence_penalty)
    for id in recent:
        if id < n and counts[id]:
            value = values[id]
            new = value / repeat if value > 0 else value * repeat
            new -= np.float32(counts[id]) * np.float32(row.frequency_penalty) + presence
            if value > -np.inf:
                values[id] = min(max(new, -HIGHEST), HIGHEST)
            counts[id] = 0
