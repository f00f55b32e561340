"""Rotary position embedding: a table of cosines and sines for the tokens of a step, and the rotation itself."""

import triton
import triton.language as tl


@triton.jit
def _cos_sin(turns):
    """Return the cosine and the sine of an f64 number of turns.

    The nearest quarter turn is subtracted in f64; Taylor's series take the rest, up to an eighth of a turn. The
    library's functions would keep a table on the stack.
    """
    turns -= tl.floor(turns)
    quarter = tl.floor(turns * 4 + 0.5)
    x = ((turns - quarter * 0.25) * 6.283185307179586).to(tl.float32)
    y = x * x
    cos = 1 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320))))
    sin = x * (1 + y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880)))))
    q = quarter.to(tl.int32) & 3
    swapped = (q & 1) != 0
    a = tl.where(swapped, sin, cos)
    b = tl.where(swapped, cos, sin)
    return tl.where((q == 1) | (q == 2), -a, a), tl.where(q >= 2, -b, b)


@triton.jit
def angles(positions, is_long, inv_freq, table, n_half, scale, WIDTH: tl.constexpr):
    """table[t, i] = scale * (cos, sin) of positions[t] * inv_freq[is_long[t], i]; grid (tokens,)."""
    t = tl.program_id(0)
    inv_freq += tl.load(is_long + t) * n_half
    i = tl.arange(0, WIDTH)
    mask = i < n_half
    turns = tl.load(positions + t).to(tl.float64) * tl.load(inv_freq + i, mask=mask, other=0.0) * 0.15915494309189535
    cos, sin = _cos_sin(turns)
    at = table + (t * n_half + i) * 2
    tl.store(at, cos * scale, mask=mask)
    tl.store(at + 1, sin * scale, mask=mask)


@triton.jit
def rope(x, x_stride, table, n_head, head_dim, n_half, NEOX: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Rotate pairs (i, n_half + i) or (2 i, 2 i + 1) of each head, in place; grid (tokens,)."""
    t = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDTH)[None, :]
    head = tl.arange(0, HEADS)[:, None]
    mask = (i < n_half) & (head < n_head)
    at = x + t * x_stride + head * head_dim + (i if NEOX else 2 * i)
    other = at + (n_half if NEOX else 1)
    cos = tl.load(table + (t * n_half + i) * 2, mask=i < n_half)
    sin = tl.load(table + (t * n_half + i) * 2 + 1, mask=i < n_half)
    a = tl.load(at, mask=mask)
    b = tl.load(other, mask=mask)
    tl.store(at, a * cos - b * sin, mask=mask)
    tl.store(other, a * sin + b * cos, mask=mask)
