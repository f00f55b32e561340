"""out = activation(gate) * up, where gate and up are the halves of x @ w.T. The halves are never stored."""

import functools

from gguf_run.formats.compiler.deferred import COMPILING
from gguf_run.formats.compiler.jit import carray
from gguf_run.kernels_cpu.matmul.matmul import BATCH_AHEAD, FEW, MOST, TUNED, cut, tile_for, tile_panels
from gguf_run.kernels_cpu.panels.panels import BLOCK, ROWS, TOKENS
from gguf_run.kernels_cpu.replay.op import TapeOp, op
from gguf_run.models.ops import ACTIVATIONS

if COMPILING:
    from gguf_run.kernels_cpu.matmul.tile import prefetch, tile
    from gguf_run.kernels_cpu.rows.activation import gated_row
    from gguf_run.kernels_cpu.rows.quantize import quantize_row
    from gguf_run.kernels_cpu.vector.native import i64_at

_UNITS = 4  # a batch: units, of 4 panels, in a piece. The panels stay in the second-level cache
_PAIR = 4 * ROWS  # bytes of 16 gates of a token; 16 numbers of `up` follow
_NEXT = 512  # one token: bytes of the next panel, which is elsewhere, that are prefetched before a panel is read
SCRATCH_BYTES = TOKENS * 2 * _PAIR


@functools.cache
def matmul_gated(panel: int, activation: str) -> TapeOp:
    """Return the op for one kind of panel (its place in PANELS) and one of ACTIVATIONS.

    A unit of work is 32 columns of out. Fields are as in matmul, and

    n_out: columns of out, a multiple of 32. The matrix has twice as many rows.
    q8: int8 form of the result, or 0.
    zeros: 32 floats.
    scratch: SCRATCH_BYTES for each thread.
    """
    panels, activation_id = tile_panels(panel), ACTIVATIONS.index(activation)

    @op("rows n_out n_steps group_bytes w x x_stride out out_stride q8 q8_stride zeros scratch scratch_stride" + TUNED)
    def matmul_gated_panel(args, piece, ith, nth):
        a = carray(args, 1)[0]
        n_tokens, n_unit = i64_at(a.rows, 1)[0], a.n_out // BLOCK
        n_piece, u0, u1, first, end = cut(piece, n_tokens, n_unit, 4 * a.group_bytes, a.piece_bytes, _UNITS, nth)
        if piece < 0:
            return n_piece
        ahead = a.ahead if n_tokens == 1 else BATCH_AHEAD
        pair, size = a.scratch + ith * a.scratch_stride, 2 * _PAIR
        to_up, x_row = a.n_out // ROWS * a.group_bytes, a.x_stride
        for p in range(2):
            prefetch(a.w + u0 * (BLOCK // ROWS) * a.group_bytes + p * to_up, ahead)
        most = a.tile_tokens if panels > 1 and n_tokens > FEW else MOST
        while first < end:
            x = a.x + first * x_row
            count = min(most, tile_for(n_tokens, n_tokens - first))
            n_here = panels if count == 4 else 1
            for unit in range(u0, u1):
                out = a.out + first * a.out_stride + unit * BLOCK * 4
                for half in range(BLOCK // ROWS):
                    w = a.w + (unit * (BLOCK // ROWS) + half) * a.group_bytes
                    for p in range(0, 2, n_here):
                        at, to = w + p * to_up, pair + p * _PAIR
                        prefetch(w + (a.group_bytes if p else to_up), _NEXT if n_tokens == 1 else -1)
                        tile(panel, panels, count, at, to_up, a.n_steps, x, x_row, to, size, a.zeros, 0, ahead)
                    for i in range(count):
                        at = pair + i * size
                        gated_row(activation_id, at, at + _PAIR, out + i * a.out_stride + half * _PAIR, 1)
                if a.q8:
                    for i in range(count):
                        row = a.q8 + (first + i) * a.q8_stride
                        quantize_row(out + i * a.out_stride, 1, row + unit * 2 * BLOCK)
            first += count
            ahead = -1
        return 0

    return matmul_gated_panel
