"""Finds the greatest values of result rows on the device: a row then sends some hundred bytes instead of all logits.

A key orders as its logit does and, among equal logits, by the lower id: the logit's bits above, the inverted id below.
Keys of tokens that must not come are negative, the others are not.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor as Array

from gguf_run.kernels_gpu.tables import Table
from gguf_run.models.backend import Top

SIZES = (1, 64)  # how many values are found
WIDTH = 1024  # columns of a program
LEAST = tl.constexpr(-(1 << 63))  # less than all keys
HALF = tl.constexpr(1 << 62)  # more than a logit's bits and an id make


@triton.jit
def _store_greatest(keys, out, K: tl.constexpr):
    """Store the K greatest keys in order. A sort takes seconds to compile; K searches are quick in a warp."""
    for i in range(K):
        greatest = tl.max(keys, axis=0)
        tl.store(out + i, greatest)
        keys = tl.where(keys == greatest, LEAST, keys)


@triton.jit
def first_keys(x, x_stride, n, masks, masks_stride, mask_of, out, K: tl.constexpr, WIDTH: tl.constexpr):
    """out int64[row, program, K] = the greatest keys of WIDTH columns of x f32[rows, n]. NaN is greater than all.

    Grid (rows, programs). mask_of: int32[rows]: the row of masks, int32[masks, n / 32], for a row; -1: none.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    value = tl.load(x + row * x_stride + column, mask=column < n, other=0.0)
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(value == value, order, 0x7FFFFFFF)
    which = tl.load(mask_of + row).to(tl.int64)
    word = tl.load(masks + which * masks_stride + column // 32, mask=(column < n) & (which >= 0), other=-1)
    is_free = ((word >> (column % 32)) & 1 == 1) | (order >= 0x7F800000)  # inf and NaN are errors of the model
    key = (order.to(tl.int64) << 31) | (0x7FFFFFFF - column).to(tl.int64)
    key = tl.where(is_free, key + HALF, key - HALF)
    _store_greatest(tl.where(column < n, key, LEAST), out + (row * tl.num_programs(1) + tl.program_id(1)) * K, K)


@triton.jit
def next_keys(keys, out, n, K: tl.constexpr, WIDTH: tl.constexpr):
    """out int64[row, program, K] = the greatest of WIDTH keys of keys int64[rows, n]; grid (rows, programs)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    given = tl.load(keys + row * n + column, mask=column < n, other=LEAST)
    _store_greatest(given, out + (row * tl.num_programs(1) + tl.program_id(1)) * K, K)


class Masks:
    """The masks of the result rows of a step, on the device."""

    def __init__(self, n_row: int, n_column: int, device: torch.device) -> None:
        self.words, self.of = Table(n_row, -(-n_column // 32), device), Table(n_row, 1, device)
        self.of.send_rows(0, np.full((n_row, 1), -1, np.int32))
        self._n = 0  # masks of the last step

    def send(self, tops: Sequence[Top | None]) -> None:
        """Replace the masks. The device must have read those before."""
        masks = {i: top.mask for i, top in enumerate(tops) if top is not None and top.mask is not None}
        if masks or self._n:
            of = np.full((len(self.of.rows), 1), -1, np.int32)
            of[[*masks], 0] = range(len(masks))
            self.of.send_rows(0, of)
        if masks:
            self.words.send_rows(0, np.stack([*masks.values()]).view(np.int32))
        self._n = len(masks)


class Finder:
    """Finds the k greatest values, one of SIZES, of each row of x f32[rows, n], and brings them to the host."""

    def __init__(self, x: Array, k: int, masks: Masks) -> None:
        self._x, self._k, self._masks = x, k, masks
        sizes = [-(-x.shape[1] // WIDTH)]
        while sizes[-1] > 1:
            sizes.append(-(-sizes[-1] * k // WIDTH))
        self._keys = [torch.empty(len(x), n * k, dtype=torch.int64, device=x.device) for n in sizes]
        self._host = torch.empty(len(x), k, dtype=torch.int64, pin_memory=x.is_cuda)

    def launch(self, n_row: int) -> None:
        (x, k, masks), keys = (self._x, self._k, self._masks), self._keys[0]
        first_keys[(n_row, keys.shape[1] // k)](
            x, x.stride(0), x.shape[1], masks.words.rows, masks.words.rows.stride(0), masks.of.rows, keys, k, WIDTH,
            num_warps=1,
        )  # fmt: skip
        for given, keys in itertools.pairwise(self._keys):
            next_keys[(n_row, keys.shape[1] // k)](given, keys, given.shape[1], k, WIDTH, num_warps=1)

    def fetch(self, n_row: int) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
        """Return the values and columns of n_row rows that the last launch found: see models.backend.Results."""
        self._host[:n_row].copy_(self._keys[-1][:n_row], non_blocking=True)
        if self._x.is_cuda:
            torch.cuda.current_stream().synchronize()
        keys = self._host[:n_row].numpy()
        is_there = keys > LEAST.value
        keys = np.where(keys < 0, keys + HALF.value, keys - HALF.value)
        order = keys >> 31
        values = np.where(order < 0, order ^ 0x7FFFFFFF, order).astype(np.int32).view(np.float32)
        columns = 0x7FFFFFFF - (keys & 0x7FFFFFFF)
        return np.where(is_there, values, np.float32(-np.inf)), np.where(is_there, columns, -1).astype(np.intp)
