"""K-quants byte for byte as libgguf writes them, which follows ggml's reference quantizer."""

from collections.abc import Callable

import libgguf
import numpy as np
import pytest
from numpy.typing import NDArray

from gguf_run.formats.quantize_k import K_QUANTIZERS
from gguf_run.formats.types import type_by_name

Array = NDArray[np.float32]
N_ROWS, N = 6, 1792  # 42 super-blocks: two full sets of lanes and a part of one; rows of 7 begin in the midst of a set

# The scale of a normal distribution, or what is done to it.
DATA: dict[str, float | Callable[[Array, np.random.Generator], Array]] = {
    "normal": 0.02,
    "heavy": lambda x, rng: x / rng.random(x.shape) ** 2,
    "sparse": lambda x, rng: x * (rng.random(x.shape) < 0.05),
    "constant groups": lambda x, rng: np.repeat(x[:, ::16], 16, axis=1),
    "constant rows": lambda x, rng: x[:, :1] + 0 * x,
    "zero": 0.0,
    "positive": lambda x, rng: abs(x),
    "negative": lambda x, rng: -1 - abs(x),
    "ties": lambda x, rng: np.round(4 * x),
    "mixed sizes": lambda x, rng: x * np.exp2(rng.integers(-30, 30, x.shape)),
    "mixed tiny": lambda x, rng: x * 10.0 ** rng.integers(-44, -1, x.shape),
    "nearly zero": 1e-15,
    "squares vanish": 1e-25,
    "denormal": 1e-40,
    "squares large": 1e18,
    "squares overflow": 1e30,
    "sums overflow": 3e37,
}


def blocks(name: str, x: Array, importance: Array | None) -> NDArray[np.uint8]:
    out = np.full((len(x), x.shape[1] // 256 * type_by_name(name).type_size), 0xAA, np.uint8)
    weights = np.zeros(0, np.float32) if importance is None else importance
    K_QUANTIZERS[name](x.reshape(-1), x.shape[1], weights, out.reshape(-1))
    return out


@pytest.mark.parametrize("name", K_QUANTIZERS)
def test_bytes_equal_the_reference(name: str) -> None:
    rng = np.random.default_rng(4)
    type = type_by_name(name)
    positive = (rng.random(N) ** 4).astype(np.float32)
    importances = (None, positive, positive * (rng.random(N) < 0.5), np.zeros(N, np.float32))
    for kind, make in DATA.items():
        x = rng.standard_normal((N_ROWS, N))
        x = (make(x, rng) if callable(make) else x * make).astype(np.float32)
        for i, importance in enumerate(importances):
            expected = libgguf.quantize_rows(x, type.id, importance)
            wrong = (blocks(name, x, importance) != expected).reshape(-1, type.type_size).any(axis=1)
            assert not wrong.any(), f"{kind}, importance {i}: block {wrong.argmax()} and {wrong.sum() - 1} others"


@pytest.mark.parametrize("n_rows", [1, 15, 16, 17])
def test_nothing_is_written_beyond_the_last_block(n_rows: int) -> None:
    x = np.random.default_rng(n_rows).standard_normal((n_rows, 256), np.float32)
    out = np.full(n_rows * 144 + 64, 0xAA, np.uint8)
    K_QUANTIZERS["Q4_K"](x.reshape(-1), 256, np.zeros(0, np.float32), out)
    assert (out[: n_rows * 144].reshape(n_rows, -1) == libgguf.quantize_rows(x, 12)).all()
    assert (out[n_rows * 144 :] == 0xAA).all()


@pytest.mark.parametrize(("name", "seed"), [("Q2_K", 30301), ("Q4_K", 8512), ("Q5_K", 2065)])
def test_scale_codes_that_outgrow_their_field(name: str, seed: int) -> None:
    """One of 10**4 super-blocks of wildly mixed sizes ends so, if weighted; the seeds were found by trying."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((1, 256)) * 10.0 ** rng.integers(-44, -1, (1, 256))).astype(np.float32)
    importance = (rng.random(256) ** 4 * (rng.random(256) < 0.5)).astype(np.float32)
    expected = libgguf.quantize_rows(x, type_by_name(name).id, importance)
    assert (blocks(name, x, importance) == expected).all()
