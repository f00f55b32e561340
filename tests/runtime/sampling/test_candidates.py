"""The random numbers of draws."""

import numpy as np
import pytest

from gguf_run.runtime.sampling.candidates import uniform

ALL = 2**64 - 1
# Of Random123's file kat_vectors, "philox4x32 10": seed, position and stream as its key and counter, two words of four.
PUBLISHED = [
    ((0, 0, 0), (0x6627E8D5, 0xE169C58D)),
    ((ALL, ALL, ALL), (0x408F276D, 0x41C83B0E)),
    ((0x299F31D0A4093822, 0x85A308D3243F6A88, 0x0370734413198A2E), (0xD16CFE09, 0x94FDCCEB)),
]


@pytest.mark.parametrize(("arguments", "words"), PUBLISHED)
def test_numbers_are_the_published_ones(arguments: tuple[int, int, int], words: tuple[int, int]) -> None:
    assert uniform(*arguments) == ((words[0] << 32 | words[1]) >> 11) / 2**53


@pytest.mark.parametrize("by", ["seed", "position", "stream"])
def test_numbers_are_spread_evenly(by: str) -> None:
    """Also those of seeds, positions and streams that follow one another; and neighbours are independent."""
    order = {"seed": lambda i: (i, 3, 0), "position": lambda i: (3, i, 0), "stream": lambda i: (3, 3, i)}[by]
    numbers = np.array([uniform(*order(i)) for i in range(4096)])
    counts = np.histogram2d(numbers[::2], numbers[1::2], bins=8, range=[[0, 1], [0, 1]])[0]
    assert ((counts - 32) ** 2 / 32).sum() < 118  # 63 degrees of freedom: above in 3 of 100,000 cases
