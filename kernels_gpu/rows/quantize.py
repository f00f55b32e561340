"""Activations as matmul reads them: int8 in blocks of 32 for few tokens, f16 for many.

int8: xq, the factor of each block, xd = max|x| / 127, and xs, the sums of a block's halves as two int16 in an int32.
f16: xh and a factor for each row, xm = max|x|. The numbers are up to 1: none is too large for an f16. Zeros fill up the
rows to a multiple of 256 columns. Elements are in the order of rows, or in that of fragments (half_at).
"""

import triton
import triton.language as tl


@triton.jit
def store_int8(x, at, made, row, n, WIDTH: tl.constexpr):
    """Store x f32[WIDTH], 0 beyond n, as columns `at` .. of a row of n columns of made = (xq, xd, xs).

    Rounds as the CPU does (`/` would not).
    """
    xq, xd, xs = made
    N: tl.constexpr = WIDTH // 32
    halves = tl.reshape(x, (N, 2, 16))
    largest = tl.max(tl.max(tl.abs(halves), axis=2), axis=1)
    inverse = tl.where(largest == 0, 0.0, tl.div_rn(127.0, largest))
    # Adding and subtracting 1.5 * 2^23 rounds. tl.fma: a GPU would fuse a plain product with the addition.
    q = ((tl.fma(halves, inverse[:, None, None], 0.0) + 12582912.0) - 12582912.0).to(tl.int32)
    block = at // 32 + tl.arange(0, N)
    i = tl.arange(0, 16)[None, None, :] + 16 * tl.arange(0, 2)[None, :, None]
    column = block[:, None, None] * 32 + i
    tl.store(xq.to(tl.pointer_type(tl.int8)) + row * n + column, q.to(tl.int8), mask=column < n)
    low, high = tl.split(tl.sum(q, axis=2))
    to = row * (n // 32) + block
    tl.store(xd + to, tl.div_rn(largest, 127.0), mask=block * 32 < n)
    tl.store(xs + to, (low & 0xFFFF) | (high << 16), mask=block * 32 < n)


@triton.jit
def quantize(x, x_stride, n, made, WIDTH: tl.constexpr):
    """Rows f32 to int8, made = (xq, xd, xs); grid (rows, n / WIDTH)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * WIDTH
    column = at + tl.arange(0, WIDTH)
    store_int8(tl.load(x + row * x_stride + column, mask=column < n, other=0.0), at, made, row, n, WIDTH)


@triton.jit
def half_at(row, column, n, EIGHTS: tl.constexpr):
    """Return where element (row, column) of rows of n columns is in xh: the place of (row, 0) plus that of (0, column).

    EIGHTS: 0 for the order of rows. For fragments, as matmul_mma takes them: of how many times 8 rows there is memory.
    They are [blocks of 256 columns][EIGHTS][8 pieces][8 rows][4 runs of 64 columns][8 columns, a piece of a run].
    """
    if EIGHTS > 0:
        piece = column // 8 % 8
        run = column // 64 % 4
        at = column // 256 * (2048 * EIGHTS) + piece * 256 + run * 8 + column % 8
        return row // 8 * 2048 + row % 8 * 32 + at
    else:
        return row * ((n + 255) // 256 * 256) + column


@triton.jit
def store_halves(x, column, made, row, n, EIGHTS: tl.constexpr):
    """Store a whole row x f32[...], 0 beyond n, in made = (xh, xm)."""
    xh, xm = made
    largest = tl.max(tl.abs(x), axis=0)
    inverse = tl.where(largest < 1e-37, 0.0, 1.0 / largest)  # 1 / largest might be inf
    at = xh + half_at(row, column, n, EIGHTS)
    tl.store(at, (x * inverse).to(tl.float16), mask=column < (n + 255) // 256 * 256)
    tl.store(xm + row, largest)


@triton.jit
def halve(x, x_stride, n, made, EIGHTS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows f32 to f16, made = (xh, xm); grid (rows,), WIDTH >= n, a multiple of 256."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    x_row = tl.load(x + row * x_stride + column, mask=column < n, other=0.0)
    store_halves(x_row, column, made, row, n, EIGHTS)
