"""What each cache type stores, in plain NumPy."""

from typing import Any

import numpy as np

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.grids import codebook
from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.quantizers.quantizer import quantize


def hadamard(n: int) -> np.ndarray:
    """Transform blocks of 2^k columns, the largest power of two that divides the number of columns."""
    h = np.ones((1, 1))
    while n % (2 * len(h)) == 0:
        h = np.block([[h, h], [h, -h]])
    return np.kron(np.eye(n // len(h)), h / np.sqrt(len(h)))


def nearest(x: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return the nearest of some ascending numbers >= 0, with the sign of x. A tie goes to the number of even index."""
    size = np.minimum(np.abs(x), numbers[-1])
    above = np.clip(np.searchsorted(numbers, size), 1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    middle = (low + high) / 2
    up = np.where(size == middle, above % 2 == 0, size > middle)
    return np.sign(x) * np.where(up, high, low)


def float8(mantissa: int, bias: int, largest: float) -> np.ndarray:
    """Return all numbers >= 0 of an 8-bit float, in ascending order."""
    codes = np.arange(128)
    exponent, rest = codes >> mantissa, (codes & ((1 << mantissa) - 1)) / (1 << mantissa)
    numbers = np.where(exponent == 0, rest * 2.0 ** (1 - bias), (1 + rest) * 2.0 ** (exponent - bias))
    return numbers[numbers <= largest]


def by_rows(x: np.ndarray, largest: float, numbers: np.ndarray, scale: Any = None) -> np.ndarray:
    """Store each row with one f16 scale."""
    if scale is None:
        scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(largest)
    scale = np.asarray(scale, np.float16).astype(np.float32)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    return nearest((x * inverse).astype(np.float64), numbers) * scale


def iq4_nl(x: np.ndarray) -> np.ndarray:
    """ggml's reference without an importance matrix: no search, sums in f32 from left to right."""
    book, blocks = codebook("iq4_nl").astype(np.float32), x.reshape(-1, 32)
    far = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    d = far / book[0]
    with np.errstate(divide="ignore"):
        scaled = blocks * np.where(d == 0, np.float32(0), np.float32(1) / d)
    q = book[(scaled[..., None] - book[:-1] >= book[1:] - scaled[..., None]).sum(axis=-1)]
    qx, qq = np.zeros(len(blocks), np.float32), np.zeros(len(blocks), np.float32)
    for i in range(32):
        weighted = blocks[:, i] * blocks[:, i] * q[:, i]
        qx, qq = qx + weighted * blocks[:, i], qq + weighted * q[:, i]
    d = np.divide(qx, qq, out=np.zeros_like(qx), where=qq > 0).astype(np.float16).astype(np.float32)
    return (d[:, None] * q).reshape(x.shape)


def int4(x: np.ndarray) -> np.ndarray:
    """Four scales are tried. The codes that fit best get the scale that fits them best. Halves of sums are added up."""

    def total(products: np.ndarray) -> np.ndarray:
        while products.shape[-1] > 1:
            products = products.reshape(*products.shape[:-1], 2, -1).sum(axis=-2)
        return products

    blocks = x.reshape(-1, 1, 32)
    far = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1)[..., None], axis=-1)
    d = far * (np.array([-1.0, -0.92, -0.85, -0.78]) / 8).astype(np.float32)[:, None]
    with np.errstate(divide="ignore"):
        scaled = blocks * np.where(d == 0, np.float32(0), np.float32(1) / d) + np.float32(8.5)
    q = np.minimum(np.maximum(scaled, 0).astype(np.int32), 15).astype(np.float32) - 8
    product, square = total(blocks * q), np.maximum(total(q * q), 1)
    best = (product * product / square).argmax(axis=1)[..., None]
    d, q = (np.take_along_axis(part, best, axis=1) for part in (product / square, q))
    return (d.astype(np.float16).astype(np.float32) * q).reshape(x.shape)


INT8 = np.arange(128.0)
E4M3, E5M2 = float8(3, 7, 448), float8(2, 15, 57344)
TWINS = {
    "q8_0": lambda x: dequantize(quantize(x, "Q8_0"), type_by_name("Q8_0")),
    "q5_1": lambda x: dequantize(quantize(x, "Q5_1"), type_by_name("Q5_1")),
    "q5_0": lambda x: dequantize(quantize(x, "Q5_0"), type_by_name("Q5_0")),
    "q4_1": lambda x: dequantize(quantize(x, "Q4_1"), type_by_name("Q4_1")),
    "q4_0": lambda x: dequantize(quantize(x, "Q4_0"), type_by_name("Q4_0")),
    "iq4_nl": iq4_nl,
    "int4": int4,
    "int8": lambda x: by_rows(x, 127, INT8),
    "fp8_e4m3": lambda x: by_rows(x, 448, E4M3),
    "fp8_e5m2": lambda x: by_rows(x, 57344, E5M2),
}
