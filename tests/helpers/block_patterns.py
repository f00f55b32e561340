"""Blocks of any bytes and of special scales, and a comparison of floats that looks at every bit."""

import numpy as np

SPECIAL_F16 = np.array(
    [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFE00],
    np.uint16,
)  # zeros, subnormals, least normal, greatest, infinities, signaling and quiet NaN


def assert_same_bits(actual, expected):
    """Equal shapes, NaN in the same places, all else equal in every bit (so -0.0 is not 0.0)."""
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    wrong = (actual.view(np.uint32) != np.ascontiguousarray(expected).view(np.uint32)) & ~nan
    assert not wrong.any(), f"{wrong.sum()} differ: {actual[wrong][:5]} instead of {expected[wrong][:5]}"


def random_blocks(seed, shape, type):
    return np.random.default_rng(seed).integers(0, 256, (*shape[:-1], shape[-1] * type.type_size), np.uint8)


def with_scales(block, type, field, values):
    """Copies of a block, uint8[len(values), type_size], in which one field takes each of the values."""
    fields = np.tile(block, (len(values), 1)).view(type.dtype)
    fields[field] = values.reshape(-1, *[1] * (fields[field].ndim - 1))
    return fields.view(np.uint8)
