"""Makes blocks of any tensor type with random weights. Only scales are computed, the rest are random bytes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import TensorType

STD = 0.02  # standard deviation of the weights; their mean is 0
# Exponents 2^-7 and 2^-6 with any sign and mantissa: the random bits that stay, and those that are set.
FLOATS = {
    "F32": (np.uint32, 0x80FFFFFF, 120 << 23),
    "BF16": (np.uint16, 0x80FF, 120 << 7),
    "F16": (np.uint16, 0x87FF, 8 << 10),
}


class RandomBlocks:
    """Blocks of one type with random weights."""

    def __init__(self, type: TensorType, rng: np.random.Generator) -> None:
        self._type, self._rng = type, rng
        self._d, self._ratio = (0.0, 0.0) if type.name in FLOATS else self._calibrated()

    def draw(self, n_blocks: int) -> NDArray[np.uint8]:
        """uint8[n_blocks, type_size]"""
        blocks = self._random(n_blocks)
        if self._type.name in FLOATS:
            word, keep, bits = FLOATS[self._type.name]
            words = blocks.view(word)
            words &= word(keep)
            words |= word(bits)
        else:
            # scales of both signs that differ from block to block, so that a wrong one would show
            factor = self._rng.uniform(-1, 1, n_blocks).astype(np.float32)
            d = self._d * (factor + np.copysign(np.float32(0.5), factor))
            self._set(blocks, d, self._ratio * d)
        return blocks

    def _random(self, n_blocks: int) -> NDArray[np.uint8]:
        n_bytes = n_blocks * self._type.type_size
        words = self._rng.integers(0, 1 << 64, -(-n_bytes // 8), np.uint64)
        blocks = words.view(np.uint8)[:n_bytes].reshape(n_blocks, -1)
        fields: Any = blocks.view(self._type.dtype)[:, 0]
        if "dmin" in (fields.dtype.names or ()):
            _match_minimums(fields["scales"])
        if self._type.name in ("TQ2_0", "Q2_0"):  # -1, 0, 1 as 0, 1, 2; the fourth number, 3, becomes 1
            fields["qs"] &= ~((fields["qs"] & fields["qs"] >> 1 & 0x55) << 1)
        return blocks

    def _calibrated(self) -> tuple[float, float]:
        """Return d, and m in proportion to d, for mean 0 and the wanted deviation. Scales of 1 are tried first."""
        blocks = self._random((1 << 16) // self._type.block_size)
        ones = np.ones(len(blocks), np.float32)

        def weights(d: float, m: float) -> NDArray[np.float32]:
            self._set(blocks, d * ones, m * ones)
            return dequantize(blocks, self._type)

        has_minimum = bool({"m", "dmin"} & set(self._type.dtype.names or ()))
        ratio = -float(weights(1, 0).mean() / weights(0, 1).mean()) if has_minimum else 0.0
        return STD / float(weights(1, ratio).std()), ratio

    def _set(self, blocks: NDArray[np.uint8], d: NDArray[np.float32], m: NDArray[np.float32]) -> None:
        """Write the blocks' scales and, where the type has them, minimums, f32[n_blocks] each."""
        fields: Any = blocks.view(self._type.dtype)[:, 0]
        if self._type.name == "MXFP4":  # a power of two
            fields["e"] = np.rint(127 + np.log2(np.abs(d)))
        elif self._type.name == "NVFP4":  # four floats of 4 bits of exponent, 3 of mantissa, the least of them 2^-9
            fields["d"] = _ue4m3(np.abs(d))[:, None]
        elif self._type.name == "IQ1_M":  # d's nibbles are the top ones of the four scales
            bits = d.astype(np.float16).view(np.uint16)[:, None] >> np.array([0, 4, 8, 12], np.uint16)
            fields["scales"] = (fields["scales"] & 0x0FFF) | (bits << 12)
        else:
            fields["d"] = d
            for name in {"m", "dmin"} & set(fields.dtype.names):
                fields[name] = m


def _match_minimums(scales: NDArray[np.uint8]) -> None:
    """Make the minimum of each group equal to its scale. Otherwise each group would have a mean of its own.

    scales: uint8[n_blocks, 16] of Q2_K, with a scale in the low and a minimum in the high nibble of each byte; or
        uint8[n_blocks, 12] of Q4_K and Q5_K: four bytes of scales, four of minimums, then nibbles as in Q2_K.
    """
    nibbles = scales
    if scales.shape[1] == 12:
        scales[:, 4:8] = scales[:, :4]
        nibbles = scales[:, 8:]
    nibbles[:] = (nibbles & 15) * 17


def _ue4m3(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the nearest unsigned floats with 4 bits of exponent (bias 7) and 3 of mantissa, from 2^-9 to 448."""
    numbers = np.arange(1, 127)
    exponent, mantissa = numbers >> 3, numbers & 7
    known = np.where(exponent > 0, np.ldexp(8.0 + mantissa, exponent - 10), np.ldexp(1.0 * mantissa, -9))
    return (1 + np.searchsorted((known[1:] + known[:-1]) / 2, values)).astype(np.uint8)
