"""Finds the greatest values of a result row on the device: a step then sends some hundred bytes instead of all logits.

A key orders as its logit does and, among equal logits, by the lower id: the logit's bits above, the inverted id below.
"""

import itertools

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor as Array

SIZES = (1, 64)  # how many values are found
WIDTH = 1024  # columns of a program
LEAST = tl.constexpr(-(1 << 63))


@triton.jit
def _store_greatest(keys, out, K: tl.constexpr):
    """Store the K greatest keys in order. One after the other: quick within a warp, and a sort compiles for seconds."""
    for i in range(K):
        greatest = tl.max(keys, axis=0)
        tl.store(out + i, greatest)
        keys = tl.where(keys == greatest, LEAST, keys)


@triton.jit
def first_keys(x, out, n, K: tl.constexpr, WIDTH: tl.constexpr):
    """out int64[program, K] = the greatest keys of WIDTH columns of x f32[n]. NaN is greater than all."""
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    value = tl.load(x + column, mask=column < n, other=0.0)
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(value == value, order, 0x7FFFFFFF)
    key = (order.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)
    _store_greatest(tl.where(column < n, key, LEAST), out + tl.program_id(0) * K, K)


@triton.jit
def next_keys(keys, out, n, K: tl.constexpr, WIDTH: tl.constexpr):
    """out int64[program, K] = the greatest of WIDTH keys of n."""
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    _store_greatest(tl.load(keys + column, mask=column < n, other=LEAST), out + tl.program_id(0) * K, K)


class Top:
    """Finds the k greatest values, one of SIZES, of the first row of x f32[rows, n], and brings them to the host."""

    def __init__(self, x: Array, k: int) -> None:
        self._x, self._k = x, k
        sizes = [-(-x.shape[1] // WIDTH) * k]
        while sizes[-1] > k:
            sizes.append(-(-sizes[-1] // WIDTH) * k)
        self._keys = [torch.empty(n, dtype=torch.int64, device=x.device) for n in sizes]
        self._host = torch.empty(k, dtype=torch.int64, pin_memory=x.is_cuda)

    def launch(self, _: int) -> None:
        x, keys = self._x, self._keys[0]
        first_keys[(len(keys) // self._k,)](x, keys, x.shape[1], self._k, WIDTH, num_warps=1)
        for given, keys in itertools.pairwise(self._keys):
            next_keys[(len(keys) // self._k,)](given, keys, len(given), self._k, WIDTH, num_warps=1)

    def fetch(self, k: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        """Return the columns and values of the k greatest that the last launch found, or of all there are."""
        self._host.copy_(self._keys[-1], non_blocking=True)
        if self._x.is_cuda:
            torch.cuda.current_stream().synchronize()
        keys = self._host.numpy()[:k]
        keys = keys[keys > LEAST.value]
        order = keys >> 32
        bits = np.where(order < 0, order ^ 0x7FFFFFFF, order).astype(np.int32)
        return 0x7FFFFFFF - (keys & 0xFFFFFFFF).astype(np.intp), bits.view(np.float32)
