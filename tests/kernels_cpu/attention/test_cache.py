"""KV caches of all types: what is stored, and attention over it, against float64 NumPy over the rows as stored.

A pair of types is one compilation of some seconds: each pair is put to as many uses as there are.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from cache_twins import E4M3, TWINS, by_rows, hadamard
from cpu_ops import Step, as_quantized, cpu, error
from numpy_backend import attend
from paged import mixed_table, places

from gguf_run.kernels_cpu.attention.cache import CpuCache
from gguf_run.kernels_cpu.attention.cache_types import CACHE_FORMATS, cache_bytes
from gguf_run.kernels_cpu.attention.move_rows import load_rows
from gguf_run.models.backend import CacheType
from gguf_run.models.operands import AttentionShape
from gguf_run.models.ops import Attend
from gguf_run.models.pages import PageTable

# Of K and V; every way to store, multiply and unpack occurs.
PAIRS = (("q8_0", "q4_0"), ("q5_1", "int8"), ("fp8_e4m3", "iq4_nl"), ("int4", "fp8_e5m2"))
CHUNKS = (5, 1, 1, 23, 1, 64, 1, 200, 1)
HEADS = ((9, 3, 64, 0), (8, 1, 128, 0), (4, 4, 96, 0), (6, 2, 64, 40), (2, 1, 256, 0))
# p as 15-bit integers; a rotated q that rounds the other way, if rarely.
BOUND, ROTATED_BOUND = 3e-4, 1e-2


def stored(cache: CpuCache, kind: str, positions: np.ndarray) -> np.ndarray:
    """Rows as they are stored, without turning them back: float64[n, n_head_kv, head_dim]."""
    rows, memory = (cache.rows_k, cache.k) if kind == "k" else (cache.rows_v, cache.v)
    return load_rows(replace(rows, rotate=False), memory, places(cache.table, 0, positions)).astype(np.float64)


class Case:
    """A program of one attention op. values: rows of q, k and v, of several sizes and with outliers."""

    def __init__(
        self, kind: CacheType, shape: AttentionShape, chunks: Sequence[int] = CHUNKS, sinks: np.ndarray | None = None
    ) -> None:
        self.shape, self.chunks, self.sinks = shape, chunks, sinks
        n, rng = sum(chunks), np.random.default_rng(7)
        widths = {"q": shape.n_head, "k": shape.n_head_kv, "v": shape.n_head_kv}
        self.values = {key: rng.standard_normal((n, h, shape.head_dim)) for key, h in widths.items()}
        self.values["q"] *= 3
        self.values["k"][..., 5] *= 8
        self.values["v"][::7] *= 1e-3
        self.values = {key: part.astype(np.float32) for key, part in self.values.items()}
        self.values["v"][3] = 0
        step = self.step = Step(cpu(3), max(chunks))
        inputs = [step.input(part.reshape(n, -1)) for part in self.values.values()]
        self.cache: CpuCache = step.backend.cache(shape, mixed_table(n), kind)
        out = step.buffer(shape.n_head * shape.head_dim)
        logits = step.vector(sinks) if sinks is not None else None
        step.add(Attend(*inputs, self.cache, shape, out, sinks=logits))
        step.finish(out)

    def expected(self, positions: np.ndarray) -> np.ndarray:
        shape, n = self.shape, positions[-1] + 1
        k, v = (stored(self.cache, kind, np.arange(n)) for kind in "kv")
        h, rows_k, rows_v = hadamard(shape.head_dim), self.cache.rows_k, self.cache.rows_v
        q = self.values["q"][positions] * np.float32(shape.scale)
        q = (q.astype(np.float64) @ h).astype(np.float32) if rows_k.rotates else q
        if rows_k.form.is_integer:
            missing = -shape.head_dim % 32
            q = as_quantized(np.pad(q, ((0, 0), (0, 0), (0, missing))))[..., : shape.head_dim]
        out = attend(q.astype(np.float64), k, v, positions, 1.0, shape.window, shape.softcap, self.sinks)
        return out @ h if rows_v.rotates else out

    def check(self) -> None:
        n_past = 0
        bound = ROTATED_BOUND if self.cache.rows_k.rotates else BOUND
        for n in self.chunks:
            result = self.step.run(n, n_past, n_past)
            expected = self.expected(n_past + np.arange(n)).reshape(n, -1)
            n_past += n
            assert error(result, expected) < bound, n_past


def attention(n_head: int, n_head_kv: int, head_dim: int, window: int = 0, softcap: float = 0.0) -> AttentionShape:
    return AttentionShape(n_head, n_head_kv, head_dim, 1.3 / head_dim**0.5, window, softcap)


@pytest.mark.parametrize(("k", "v"), PAIRS)
def test_attention_over_what_is_stored(k: str, v: str) -> None:
    for heads in HEADS:
        for rotate in (False, None):
            Case(CacheType(k, v, rotate), attention(*heads)).check()


def test_head_sizes_that_are_no_whole_blocks() -> None:
    for head_dim, types in itertools.product((40, 80), (("f16", "f16"),)):
        Case(CacheType(*types), attention(3, 1, head_dim)).check()
    for (k, v), head_dim in itertools.product(PAIRS, (40, 48)):
        assert CACHE_FORMATS[k].allows(head_dim) == (k in ("fp8_e4m3", "int8"))
        assert CACHE_FORMATS[v].allows(head_dim) == (v in ("fp8_e5m2", "int8"))


@pytest.mark.parametrize(("k", "v"), [("f32", "f32"), PAIRS[0]])
def test_softcap_and_sinks(k: str, v: str) -> None:
    """Logits that no position reaches, that all do, and between; over parts of positions and without."""
    sinks = np.array([0, 3, -50, 90], np.float32)
    for chunks in (CHUNKS, (600, 1)):
        Case(CacheType(k, v, False), attention(4, 2, 64, 0, 5.0), chunks).check()
        Case(CacheType(k, v, False), attention(4, 2, 64, 0), chunks, sinks).check()
        Case(CacheType(k, v, None), attention(4, 2, 64, 100, 30.0), chunks, sinks).check()


@pytest.mark.parametrize("head_dim", [32, 96, 128, 256])
def test_rotation_changes_nothing(head_dim: int) -> None:
    """In f32 the results with it and without are the same, to rounding."""
    plain, rotated = (Case(CacheType("f32", "f32", rotate), attention(4, 2, head_dim)) for rotate in (False, True))
    n_past = 0
    for n in CHUNKS:
        a, b = (case.step.run(n, n_past, n_past) for case in (plain, rotated))
        n_past += n
        assert error(a.astype(np.float64), b.astype(np.float64)) < 2e-5
    assert error(stored(rotated.cache, "k", np.arange(5)), rotated.values["k"][:5] @ hadamard(head_dim)) < 1e-6
    np.testing.assert_allclose(
        load_rows(rotated.cache.rows_k, rotated.cache.k, places(rotated.cache.table, 0, np.arange(5))),
        rotated.values["k"][:5],
        atol=1e-5,
    )


@pytest.mark.parametrize(("k", "v"), PAIRS)
def test_rows_are_stored_as_the_reference_does(k: str, v: str) -> None:
    case = Case(CacheType(k, v, False), attention(2, 2, 64), (100, 1, 30))
    n_past = 0
    for n in case.chunks:
        case.step.run(n, n_past, n_past)
        n_past += n
    for kind, name in (("k", k), ("v", v)):
        rows, x = stored(case.cache, kind, np.arange(n_past)), case.values[kind]
        np.testing.assert_array_equal(rows, TWINS[name](x), err_msg=name)
        if name == "int4":  # what the search is for
            errors = [((y - x) ** 2).sum() for y in (rows, TWINS["q4_0"](x))]
            assert errors[0] < errors[1]


def test_static_scales_saturate() -> None:
    k_scales, v_scales = (0.02, 0.5), None
    case = Case(CacheType("fp8_e4m3", "iq4_nl", False, k_scales, v_scales), attention(4, 2, 64), (40, 1))
    case.check()
    rows, scales = stored(case.cache, "k", np.arange(41)), np.array(k_scales)[:, None]
    np.testing.assert_array_equal(rows, by_rows(case.values["k"], 448, E4M3, scales))
    assert np.abs(rows[:, 0]).max() == np.float32(448) * np.float16(0.02)


@pytest.mark.parametrize(("name", "part"), [("q8_0", 34 / 64), ("q4_0", 18 / 64), ("int8", 130 / 256), ("f32", 2)])
def test_sizes(name: str, part: float) -> None:
    head_dim = 128 if name == "int8" else 64
    assert cache_bytes(name, name, 8, head_dim, 4096) == part * cache_bytes("f16", "f16", 8, head_dim, 4096)
    cache = cpu(1).cache(attention(8, 8, head_dim), PageTable.new(0, 4096, 64, 1), CacheType(name, name))
    assert cache.k.nbytes + cache.v.nbytes == cache_bytes(name, name, 8, head_dim, 4096)
