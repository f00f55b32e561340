"""The assembler that takes bytes apart on NVIDIA GPUs, line by line in NumPy: the interpreter does not run it."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from gguf_run.kernels_gpu.attention import cache_rows
from gguf_run.kernels_gpu.panels import dots
from gguf_run.kernels_gpu.panels.panels import PANELS, IntPanel

CODES = np.arange(256, dtype=np.uint8)


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Byte i of the result is the one of the eight bytes of (a, b) that nibble i of the selector names."""
    result = np.uint32(0)
    for i in range(4):
        nibble = selector >> 4 * i & 15
        assert (nibble < 8).all()
        result = result | (np.where(nibble < 4, a, b) >> 8 * (nibble % 4) & 255) << 8 * i
    return result


def sub_f16x2(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    halves = (np.ascontiguousarray(x)[..., None].view(np.float16) for x in np.broadcast_arrays(a, b))
    return operator.sub(*halves).view(np.uint32)[..., 0]


OPS: dict[str, Callable[..., Any]] = {
    "mov.b32": lambda a: a,
    "and.b32": operator.and_,
    "or.b32": operator.or_,
    "xor.b32": operator.xor,
    "shr.u32": operator.rshift,
    "add.u32": operator.add,
    "prmt.b32": prmt,
    "sub.f16x2": sub_f16x2,
}


def run(code: str, n_out: int, *inputs: np.ndarray) -> list[np.ndarray]:
    """Return the results of inline assembler for registers of four bytes, as bytes."""
    held = {f"${n_out + i}": x.view(np.uint32) for i, x in enumerate(inputs)}
    for line in code.strip("{} \n").split(";"):
        op, *names = line.replace(",", " ").split() or [".reg"]
        if op != ".reg":
            to, *of = names
            held[to] = OPS[op](*(held[x] if x in held else np.uint32(int(x, 0) & 0xFFFFFFFF) for x in of))
    return [np.ascontiguousarray(held[f"${i}"], np.uint32).view(np.uint8) for i in range(n_out)]


def as_halves(code: str, x: np.ndarray) -> np.ndarray:
    pairs = (part.view(np.float16).reshape(-1, 2) for part in run(code, 2, x))
    return np.concatenate([*pairs], axis=1).reshape(-1)


@pytest.mark.parametrize("offset", [0, 8, 16])
def test_bytes_become_halves(offset: int) -> None:
    assert np.array_equal(as_halves(cache_rows.half_code(False, offset), CODES), CODES.astype(int) - offset)
    assert np.array_equal(as_halves(cache_rows.half_code(True, 128), CODES), CODES.view(np.int8))


def test_nibbles_and_high_bits() -> None:
    low, high = run(cache_rows.NIBBLES.value, 2, CODES)
    assert np.array_equal(low, CODES & 15)
    assert np.array_equal(high, CODES >> 4)
    rng = np.random.default_rng(0)
    codes, bits = rng.integers(0, 16, 4096, np.uint8), rng.integers(0, 256, 4096, np.uint8)
    masks = np.uint8(1) << rng.integers(0, 8, 4096, np.uint8)
    (with_bits,) = run(cache_rows.HIGH_BIT.value, 1, bits, masks, codes)
    assert np.array_equal(with_bits, codes + 16 * ((bits & masks) > 0))


@pytest.mark.parametrize("name", ["IQ4_NL", "MXFP4"])
def test_numbers_of_a_book(name: str) -> None:
    panel = PANELS[name]
    assert isinstance(panel, IntPanel)
    low, high = run(dots.look_up_code(panel.book_words), 2, CODES)
    book = np.array(panel.book, np.int8)
    assert np.array_equal(low.view(np.int8), book[CODES & 15])
    assert np.array_equal(high.view(np.int8), book[CODES >> 4])
