"""Measures what this machine can do in a second with n threads: bytes read from memory, and int8 operations.

To decode a token is to read all weights once. A long prompt multiplies all weights with many tokens. The two limits
bound the speed of any kernel. They are measured with the thread team and the SIMD vocabulary of the kernels.
"""

import functools
import operator
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.compiler.jit import carray
from gguf_run.kernels_cpu.panels.memory import aligned
from gguf_run.kernels_cpu.replay.op import TapeOp, op
from gguf_run.kernels_cpu.replay.team import Team
from gguf_run.kernels_cpu.vector import isa
from gguf_run.kernels_cpu.vector.lowering import simd_kernel
from gguf_run.kernels_cpu.vector.simd import I8, I32, Simd, Val

_LINE = 64
_LANES = 16  # i32 lanes of a 64-byte vector
_READ_PIECE = 1 << 20
_LOADS = 8  # cache lines read in an iteration, each into a sum of its own
# Bytes to read: _CACHES times the size of all caches, so that their contents from the run before do not matter.
_LEAST_READ, _MOST_READ, _CACHES = 512 << 20, 4 << 30, 16
_DOT_PIECES, _DOT_STEPS = 4, 2_000  # pieces of each thread in a pass, and steps of a piece
_DOT_BITS = 7  # of the unsigned operand. Some instruction sets need extra work for 8 bits
# Vectors of each operand in a step. There are side * side sums: enough for the pipelines, not too many for registers.
_DOT_SIDES = {"vnni512": 4}
_RUNS = 50  # runs, if each takes `seconds`; fewer if a run takes longer


@dataclass(frozen=True)
class Limits:
    """The limits of the CPU with n_threads threads, or of a GPU."""

    n_threads: int  # 0 for a GPU
    read_bytes: float  # bytes read in a second
    int8_ops: float  # int8 additions and multiplications in a second (GPU: f16)
    name: str = ""  # of the GPU


def measure_limits(n_threads: int, n_bytes: int | None = None, seconds: float = 0.005) -> Limits:
    """Measure the limits with n_threads threads. It takes about half a second.

    n_bytes: size of the memory that is read. None: many times the size of all caches.
    seconds: time of a run, or a little more. A limit is the best of many runs: other work of the machine makes a run
        slower, never faster.
    """
    team = Team(n_threads)
    try:
        sums = aligned(_LINE * n_threads)
        data = _memory(n_bytes or _read_size(), n_threads)
        addresses = {"data": data.ctypes.data, "sums": sums.ctypes.data}
        read = _rate(team, _read, data.nbytes, seconds, n_bytes=data.nbytes, **addresses)
        side = _DOT_SIDES.get(isa.current().dot, 2)
        n_ops = n_threads * _DOT_PIECES * _DOT_STEPS * side * side * 2 * 4 * _LANES
        dot = _rate(team, _dot, n_ops, seconds, **addresses)
    finally:
        team.close()
    return Limits(n_threads, read, dot)


def _memory(n_bytes: int, n_threads: int) -> NDArray[np.uint8]:
    """Return memory like that of weights: with large pages, first touched by several threads."""
    data = aligned(-(-n_bytes // _READ_PIECE) * _READ_PIECE)
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(lambda part: part.fill(1), np.array_split(data, 4 * n_threads)))  # list: wait for all
    return data


def _read_size(cpus: Path = Path("/sys/devices/system/cpu")) -> int:
    """Return the bytes to read: many times the size of all caches."""
    return min(max(_CACHES * cache_bytes(cpus), _LEAST_READ), _MOST_READ)


def cache_bytes(cpus: Path = Path("/sys/devices/system/cpu")) -> int:
    """Return the size of all caches together, as far as the system tells it."""
    caches = {}
    for cache in cpus.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            size = re.fullmatch(r"(\d+)K", (cache / "size").read_text().strip())
            shared = tuple((cache / name).read_text() for name in ("level", "type", "shared_cpu_list"))
        except OSError:
            continue
        if size:
            caches[shared] = int(size[1]) << 10
    return sum(caches.values())


def _rate(team: Team, op: TapeOp, work: int, seconds: float, **arguments: int) -> float:
    """Return the work in a second of the best run. A run does the op's `work` until it takes `seconds`."""
    bound = op.bind(**arguments)
    tape = np.array([(op.compiled.address, bound.ctypes.data)], np.int64)
    while (once := _seconds(team, tape)) < seconds:
        tape = np.concatenate([tape, tape])
    n_runs = max(5, round(_RUNS * seconds / once))
    return work * len(tape) / min(_seconds(team, tape) for _ in range(n_runs))


def _seconds(team: Team, tape: NDArray[np.int64]) -> float:
    start = time.perf_counter()
    team.run(tape)
    return time.perf_counter() - start


def _keep(s: Simd, sums: list[Val], address: Val) -> None:
    """Add the sums to memory: the compiler drops what nobody reads."""
    s.store(functools.reduce(operator.add, sums, s.load(address, I32, _LANES)), address)


@simd_kernel
def _read_lines(s: Simd, address: Val, n_steps: Val, to: Val) -> None:
    """Read _LOADS cache lines in each of n_steps steps."""

    def body(i: Val, sums: list[Val]) -> list[Val]:
        at = address + i * (_LINE * _LOADS)
        return [total + s.load(at + _LINE * k, I32, _LANES) for k, total in enumerate(sums)]

    _keep(s, s.loop(n_steps, [s.const(I32, 0, _LANES)] * _LOADS, body), to)


@op("data n_bytes sums")
def _read(args, piece, ith, nth):
    """Read all of data once."""
    a = carray(args, 1)[0]
    if piece < 0:
        return a.n_bytes // _READ_PIECE
    _read_lines(a.data + piece * _READ_PIECE, _READ_PIECE // (_LINE * _LOADS), a.sums + _LINE * ith)
    return 0


@simd_kernel
def _dots(s: Simd, address: Val, n_steps: Val, to: Val) -> None:
    """Dot products of a few kB, which stay in the first-level cache, with vectors that stay in registers.

    One operand is loaded anew in each step: else the compiler would take the products out of the loop.
    """
    side = _DOT_SIDES.get(s.isa.dot, 2)
    xs = [s.load(address + _LINE * k, I8, 4 * _LANES) for k in range(side)]

    def body(i: Val, sums: list[Val]) -> list[Val]:
        at = address + (i & 7) * (_LINE * side)
        us = [s.load(at + _LINE * k, I8, 4 * _LANES) for k in range(side)]
        pairs = [(u, x) for u in us for x in xs]
        return [s.dot(total, u, x, _DOT_BITS) for total, (u, x) in zip(sums, pairs, strict=True)]

    _keep(s, s.loop(n_steps, [s.const(I32, 0, _LANES)] * (side * side), body), to)


@op("data sums")
def _dot(args, piece, ith, nth):
    """_DOT_PIECES pieces of dot products for each thread."""
    a = carray(args, 1)[0]
    if piece < 0:
        return _DOT_PIECES * nth
    _dots(a.data, _DOT_STEPS, a.sums + _LINE * ith)
    return 0
