"""The Hadamard transform, which flattens outliers before few bits are stored. The CPU has the same transform."""

import triton
import triton.language as tl


@triton.jit
def _mix(x, N: tl.constexpr):
    """Transform the rows of x f32[rows, blocks, N]: out[i] = sum over j of x[j] * (-1)^(number of bits in i & j)."""
    i = tl.arange(0, N)
    bits = i[:, None] & i[None, :]
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return tl.sum(x[:, :, None] * (1 - 2 * (bits & 1)).to(tl.float32)[None, :, :], axis=1)


@triton.jit
def hadamard(x, N: tl.constexpr):
    """Return the orthonormal transform of x f32[WIDTH], in blocks of the largest power of two that divides N (>= 32).

    A block is a matrix of 8 columns: first its rows are transformed, then its columns.
    """
    BLOCK: tl.constexpr = N & -N
    A: tl.constexpr = BLOCK // 8
    WIDTH: tl.constexpr = x.shape[0]
    y = _mix(tl.reshape(x, (WIDTH // 8, 8)), 8)
    y = tl.permute(tl.reshape(y, (WIDTH // BLOCK, A, 8)), (0, 2, 1))
    y = _mix(tl.reshape(y, (WIDTH // A, A)), A)
    y = tl.permute(tl.reshape(y, (WIDTH // BLOCK, 8, A)), (0, 2, 1))
    return tl.reshape(y, (WIDTH,)) * (BLOCK**-0.5)
