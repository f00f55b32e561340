"""out = activation(gate) * up with gate, up = the halves of x @ w.T, which never get to memory."""

import functools

from gguf_run.formats.compiler.jit import carray
from gguf_run.kernels_cpu.matmul.int_tile import AHEAD
from gguf_run.kernels_cpu.matmul.matmul import TOKENS, cut, tile_panels
from gguf_run.kernels_cpu.matmul.tile import prefetch, tile
from gguf_run.kernels_cpu.panels.panels import BLOCK, ROWS
from gguf_run.kernels_cpu.replay.op import TapeOp, op
from gguf_run.kernels_cpu.rows.activation import ACTIVATIONS, gated_row
from gguf_run.kernels_cpu.rows.quantize import quantize_row
from gguf_run.kernels_cpu.vector.native import i64_at

_UNITS = 4  # a batch: of 4 panels each in a piece, so that they stay in the second-level cache
_PAIR = 4 * ROWS  # bytes of a row of 16 gates; as many of `up` follow
SCRATCH_BYTES = TOKENS * 2 * _PAIR


@functools.cache
def matmul_gated(panel: int, activation: str) -> TapeOp:
    """The op for one panel, a number of PANELS, and one of ACTIVATIONS.

    Fields as in matmul; n_out: columns of out, a multiple of 32: the matrix has twice as many rows. A unit of work is
    32 columns, a block of the activations that go into q8 if it is not 0. zeros: 32 floats.
    """
    tokens, panels, gelu = TOKENS, tile_panels(panel), ACTIVATIONS.index(activation)

    @op(
        "rows n_out n_steps step_bytes group_bytes w x x_stride out out_stride q8 q8_stride zeros "
        "scratch scratch_stride"
    )
    def matmul_gated_panel(args, piece, ith, nth):  # type: ignore[no-untyped-def]
        a = carray(args, 1)[0]
        n_tokens, n_unit = i64_at(a.rows, 1)[0], a.n_out // BLOCK
        n_tile = (n_tokens + tokens - 1) // tokens
        n_piece, first, end, t0, t1 = cut(piece, n_tokens, n_tile, n_unit, 4 * a.group_bytes, _UNITS, 1, nth)
        if piece < 0:
            return n_piece
        pair, stride = a.scratch + ith * a.scratch_stride, 2 * _PAIR
        to_up = a.n_out // ROWS * a.group_bytes
        if n_tokens == 1:
            for p in range(2):
                prefetch(a.w + first * (BLOCK // ROWS) * a.group_bytes + p * to_up)
        for t in range(t0, t1):
            x = a.x + t * tokens * a.x_stride
            count, ahead = 1 if n_tokens == 1 else tokens, a.group_bytes if t == t0 else 0
            for unit in range(first, end):
                out = a.out + t * tokens * a.out_stride + unit * BLOCK * 4
                for half in range(BLOCK // ROWS):
                    w = a.w + (unit * (BLOCK // ROWS) + half) * a.group_bytes
                    if n_tokens == 1:
                        for p in range(2):
                            tile(
                                panel, 1, 1, w + p * to_up, 0, a.step_bytes, a.n_steps,
                                x, a.x_stride, pair + p * _PAIR, stride, a.zeros, 0, AHEAD,
                            )  # fmt: skip
                    else:
                        for p in range(0, 2, panels):
                            tile(
                                panel, panels, tokens, w + p * to_up, to_up, a.step_bytes, a.n_steps,
                                x, a.x_stride, pair + p * _PAIR, stride, a.zeros, 0, ahead,
                            )  # fmt: skip
                    for i in range(count):
                        at = pair + i * stride
                        gated_row(gelu, at, at + _PAIR, out + i * a.out_stride + half * _PAIR, 1)
                if a.q8:
                    for i in range(count):
                        row = a.q8 + (t * tokens + i) * a.q8_stride
                        quantize_row(out + i * a.out_stride, 1, row + unit * 2 * BLOCK)
        return 0

    return matmul_gated_panel
