"""out[t] = activation(bias + sum over j of taps[j] * x[t - n_taps + 1 + j]), channel by channel.

Tokens are taken from the last to the first: then out may be x. The rows before a run are in its state.
"""

import functools

from gguf_run.formats.compiler.deferred import COMPILING
from gguf_run.formats.compiler.jit import carray, njit
from gguf_run.kernels_cpu.replay.op import PER_THREAD, TapeOp, op
from gguf_run.kernels_cpu.replay.runs import runs_at
from gguf_run.kernels_cpu.vector.lowering import simd_kernel
from gguf_run.kernels_cpu.vector.simd import F32, I64, Simd, Val

if COMPILING:
    from gguf_run.kernels_cpu.vector.native import f32_at, i64_at

_BLOCK = 256  # channels of a piece of work, or more


@simd_kernel
def _row(
    s: Simd, n_taps: int, silu: int, lanes: int, rows: Val, taps: Val, width: Val, bias: Val, out: Val, n: Val
) -> None:
    """One token's n times `lanes` channels.

    rows: address of the addresses of n_taps rows. taps: address of f32[n_taps][width]. bias, out: addresses of f32.
    """
    x = [s.load(rows + 8 * j, I64) for j in range(n_taps)]

    def body(i: Val) -> None:
        at = i * (4 * lanes)
        total = s.load(bias + at, F32, lanes)
        for j in range(n_taps):
            total = s.fma(s.load(taps + width * (4 * j) + at, F32, lanes), s.load(x[j] + at, F32, lanes), total)
        s.store(total / (s.exp(total * -1.0) + 1.0) if silu else total, out + at)

    s.each(n, body)


@functools.cache
def short_conv(n_taps: int, silu: bool) -> TapeOp:
    """Return the op for so many taps.

    n: channels. taps: f32[n_taps, n]. bias: f32[n]. state: f32[n_slots, n_taps - 1, n]. zeros: f32[n].
    """
    n_old = n_taps - 1

    @njit(inline="always")
    def source(a, run, t, at):
        """The address of token t of a run, or of one before the run. at: of the first channel, in bytes."""
        if t >= 0:
            return a.x + (run.first + t) * a.x_stride + at
        return a.state + ((run.reads + 1) * n_old + t) * a.n * 4 + at if run.n_past else a.zeros

    @op("n_runs runs n x x_stride out out_stride taps bias state zeros scratch scratch_stride")
    def conv(args, piece, ith, nth):
        a = carray(args, 1)[0]
        n, n_runs = a.n, i64_at(a.n_runs, 1)[0]
        n_blocks = max(1, min(-(-n // _BLOCK), PER_THREAD * nth // n_runs))
        if piece < 0:
            return n_runs * n_blocks
        run, block = runs_at(a.runs, n_runs)[piece // n_blocks], piece % n_blocks
        scratch = a.scratch + ith * a.scratch_stride
        first = n * block // n_blocks // 16 * 16
        width = (n if block == n_blocks - 1 else n * (block + 1) // n_blocks // 16 * 16) - first
        at, rows = 4 * first, i64_at(scratch, n_taps)
        for j in range(n_old):  # the state after the run, before out overwrites x
            old = f32_at(source(a, run, run.n_tokens - n_old + j, at), width)
            new = f32_at(a.state + (run.writes * n_old + j) * n * 4 + at, width)
            for i in range(width):
                new[i] = old[i]
        for t in range(run.n_tokens - 1, -1, -1):
            for j in range(n_taps):
                rows[j] = source(a, run, t - n_old + j, at)
            taps, bias, out = a.taps + at, a.bias + at, a.out + (run.first + t) * a.out_stride + at
            _row(n_taps, silu, 16, scratch, taps, n, bias, out, width // 16)
            done = width // 16 * 64
            for j in range(n_taps):
                rows[j] += done
            _row(n_taps, silu, 1, scratch, taps + done, n, bias + done, out + done, width % 16)
        return 0

    return conv
