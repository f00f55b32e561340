"""Attention whose values are the first columns of its keys, against float64 NumPy over the keys as stored."""

from dataclasses import replace

import numpy as np
import pytest
from cpu_ops import Step, as_quantized, cpu, error
from numpy_backend import attend, rotate
from paged import mixed_table, places

from gguf_run.kernels_cpu.attention.cache import CpuCache
from gguf_run.kernels_cpu.attention.cache_types import CACHE_FORMATS, cache_bytes
from gguf_run.kernels_cpu.attention.move_rows import load_rows
from gguf_run.models.backend import CacheType, Run
from gguf_run.models.operands import AttentionShape, Rotation
from gguf_run.models.ops import Attend
from gguf_run.models.pages import PageTable

CHUNKS = (5, 1, 1, 23, 1, 64, 1, 200, 1)
BOUND = 1e-5
# Heads, columns of a key, of a value. The keys of the first are no whole blocks, its tiles are the smallest.
SHAPES = ((4, 40, 32), (16, 576, 512), (70, 96, 64), (3, 64, 64))


class Case:
    """A program of one attention op over two sequences, of which the second one is used."""

    def __init__(self, name: str, shape: AttentionShape, chunks: tuple[int, ...] = CHUNKS) -> None:
        self.shape, n, rng = shape, sum(chunks), np.random.default_rng(7)
        self.q, self.k = (rng.standard_normal((n, h, shape.head_dim)).astype(np.float32) for h in (shape.n_head, 1))
        self.step = Step(cpu(3), max(chunks))
        q, k = (self.step.input(part.reshape(n, -1)) for part in (self.q * 3, self.k))
        self.q *= 3
        self.cache: CpuCache = self.step.backend.cache(shape, mixed_table(n, 2), CacheType(name, "f16"))
        out = self.step.buffer(shape.n_head * shape.n_value)
        self.step.add(Attend(q, k, k.columns(0, shape.n_value), self.cache, shape, out))
        self.step.finish(out)

    def stored(self, n: int) -> np.ndarray:
        return load_rows(self.cache.rows_k, self.cache.k, places(self.cache.table, 1, np.arange(n))).astype(np.float64)

    def check(self, n_past: int, n: int) -> None:
        ids, shape = np.arange(n_past, n_past + n), self.shape
        result = self.step.program.run(ids.astype(np.int32), [Run(1, n_past, n)], range(n)).values.copy()
        k, q = self.stored(n_past + n), (self.q[ids] * np.float32(shape.scale)).astype(np.float64)
        if self.cache.rows_k.form.is_integer:
            missing = -shape.head_dim % 32
            q = as_quantized(np.pad(q, ((0, 0), (0, 0), (0, missing))))[..., : shape.head_dim]
        expected = attend(q, k, k[..., : shape.n_value], ids, 1.0, 0).reshape(n, -1)
        assert error(result, expected) < BOUND, n_past


def latent(n_head: int, head_dim: int, n_value: int) -> AttentionShape:
    return AttentionShape(n_head, 1, head_dim, 1.3 / head_dim**0.5, n_latent=n_value)


@pytest.mark.parametrize("name", ["f16", "q5_1"])
def test_values_are_columns_of_keys(name: str) -> None:
    for sizes in SHAPES:
        if CACHE_FORMATS[name].allows(sizes[1]):
            case, n_past = Case(name, latent(*sizes)), 0
            for n in CHUNKS:
                case.check(n_past, n)
                n_past += n


def test_the_cache_holds_each_row_once() -> None:
    before = (backend := cpu(3)).nbytes()["cache"]
    cache = backend.cache(latent(16, 576, 512), PageTable.new(0, 4096, 512, 1), CacheType("f16", "f32"))
    assert cache.kinds == "k"
    n_bytes = backend.nbytes()["cache"] - before
    assert n_bytes == 4096 * 576 * 2 == cache_bytes("f16", "f32", 1, 576, 4096, 512)


def test_shift_turns_the_last_columns() -> None:
    rotation = Rotation("norm", 8, 1e4 ** -(np.arange(4) / 4))
    case = Case("f16", latent(4, 40, 32), (128, 1))
    case.check(0, 128)
    before = case.stored(128)
    groups = places(case.cache.table, 1, np.arange(0, 128, 32)) // 32
    case.cache.move(groups[3:], groups[1:2], rotation, -64)
    moved = before[96:]
    moved[..., 32:] = rotate(moved[..., 32:], replace(rotation, scale=1.0), np.full(32, -64))
    assert error(case.stored(64), np.concatenate([before[:32], moved])) < 1e-3
    data = case.cache.read("k", groups[:2])
    assert len(data) == 2 * case.cache.group_bytes("k")
    other = places(case.cache.table, 0, np.array([0, 32])) // 32
    case.cache.write("k", other, data)
    np.testing.assert_array_equal(case.cache.read("k", other), data)
    case.cache.copy(int(other[0]) // 2, int(groups[2]) // 2)
    np.testing.assert_array_equal(case.cache.read("k", groups[2:]), data)
