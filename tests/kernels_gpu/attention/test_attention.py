"""Attention and KV caches of all types on the GPU backend, in Triton's interpreter, against float64 NumPy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from cache_twins import TWINS, hadamard
from cpu_ops import Step, error
from gpu_ops import fast_dots, gpu, pytestmark, torch
from numpy_backend import attend, rotate, softmax, visible

from gguf_run.formats.errors import OptionError
from gguf_run.kernels_gpu.attention import launch as attention_launch
from gguf_run.kernels_gpu.attention.cache import GpuCache, Rows
from gguf_run.kernels_gpu.attention.cache_types import CACHE_FORMATS
from gguf_run.models.backend import CacheType, Run
from gguf_run.models.operands import AttentionShape, Rotation
from gguf_run.models.ops import Attend, Rope

__all__ = ["fast_dots", "pytestmark"]
PAIRS = (("f16", "bf16"), ("q8_0", "q4_0"), ("q4_0", "int8"), ("int8", "q8_0"), ("fp8_e4m3", "fp8_e5m2"))
PAIRS += (("bf16", "fp8_e4m3"), ("fp8_e5m2", "f32"), ("f32", "f16"))
CHUNKS = (3, 40, 1)
U = 2.0**-11  # the most that one f16 is off, relative
SIGMAS = 5


def stored(rows: Rows, seq: int = 0) -> np.ndarray:
    """Rows of a sequence as they are stored, without turning them back: float64[n_ctx, n_head_kv, head_dim]."""
    qs, name = rows.qs[seq].cpu().numpy(), rows.type.name
    d = None if rows.d is None else rows.d[seq].cpu().numpy().astype(np.float64)
    if name == "q4_0":
        byte = qs.reshape(*qs.shape[:-1], -1, 1, 16)
        codes = np.concatenate([byte & 15, byte >> 4], -2).reshape(*qs.shape[:-1], -1).astype(np.float64) - 8
    elif name == "bf16":
        codes = (qs.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    elif name == "fp8_e4m3":
        size = qs & 0x7F
        exponent, rest = size >> 3, (size & 7) / 8
        codes = np.where(exponent == 0, rest * 2.0**-6, (1 + rest) * 2.0 ** (exponent.astype(int) - 7))
        codes = np.where(qs & 0x80, -codes, codes)
    else:
        codes = {
            "f32": lambda: qs.view(np.float32),
            "f16": lambda: qs.view(np.float16),
            "fp8_e5m2": lambda: (qs.astype(np.uint16) << 8).view(np.float16),
            "q8_0": lambda: qs.view(np.int8),
            "int8": lambda: qs.view(np.int8),
        }[name]()
    values = codes.astype(np.float64)
    if d is not None:
        values *= np.repeat(d, values.shape[-1] // d.shape[-1], -1)
    return values.transpose(1, 0, 2)


def roundings(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray, shape: AttentionShape, sinks: Any, h: np.ndarray
) -> np.ndarray:
    """What attention over k, v and h's transform of the result may be off, from what becomes an f16 on the way.

    Rounding moves a number x by up to U |x|, by U |x| / sqrt(3) in the mean square, each one by itself. d(result) =
    sum of weights * (values - result) * d(score) to first order, where score = scale * q . k: so much for q, which is
    the same for all positions, and for k; a softcap makes it no more. And weights and values are rounded, tiny ones by
    up to 2^-25. What f32 adds is 2e-5 at most, by exp2 of scores up to 100.
    """
    hidden = ~visible(positions, len(k), shape.window, shape.is_chunked)
    off = np.empty_like(q)
    n_gqa = shape.n_head // shape.n_head_kv
    for head in range(shape.n_head):
        keys, values, x = k[:, head // n_gqa], v[:, head // n_gqa], q[:, head]
        s = x @ keys.T * shape.scale
        s = np.where(hidden, -np.inf, shape.softcap * np.tanh(s / shape.softcap) if shape.softcap else s)
        if sinks is not None:
            s = np.pad(s, ((0, 0), (0, 1)), constant_values=sinks[head])
        weights = softmax(s)[:, : len(k)]
        apart = (values @ h) - (weights @ values @ h)[:, None]  # [tokens, positions, head_dim]
        by_q = np.einsum("tc,tcd->td", x**2, np.einsum("tj,jc,tjd->tcd", weights, keys, apart, optimize=True) ** 2)
        by_k = np.einsum("tj,tjd->td", weights**2 * (x**2 @ (keys**2).T), apart**2)
        own = (weights**2 @ values**2) @ h**2
        squares = shape.scale**2 * (by_q + by_k) + 2 * own
        tiny = 2.0**-25 * (1 + np.abs(values).sum(0)) @ np.abs(h)
        f32 = 2e-5 * np.sqrt((weights @ np.abs(values)) ** 2 @ h**2)
        off[:, head] = SIGMAS * U / np.sqrt(3) * np.sqrt(squares) + f32 + tiny
    return off


class Case:
    """A program of rope and attention, whose result may be multiplied with a matrix."""

    def __init__(
        self,
        kind: CacheType,
        shape: AttentionShape,
        *,
        rotation: Rotation | None = None,
        sinks: np.ndarray | None = None,
        chunks: Sequence[int] = CHUNKS,
        n_seq: int = 1,
    ) -> None:
        self.shape, self.rotation, self.sinks, self.chunks = shape, rotation, sinks, chunks
        n, rng = sum(chunks), np.random.default_rng(7)
        heads = (shape.n_head, shape.n_head_kv, shape.n_head_kv)
        self.q, self.k, self.v = (rng.standard_normal((n, h, shape.head_dim)).astype(np.float32) for h in heads)
        self.q *= 3
        self.k[..., 5] *= 4
        self.v[::7] *= 1e-3
        self.v[3] = 0
        step = self.step = Step(gpu(), max(chunks))
        qkv = step.input(np.concatenate([x.reshape(n, -1) for x in (self.q, self.k, self.v)], axis=1))
        n_q, n_kv = (h * shape.head_dim for h in heads[:2])
        if rotation is not None:
            step.add(Rope(qkv.columns(0, n_q + n_kv), rotation, shape.head_dim))
        self.cache: GpuCache = step.backend.cache(shape, n, max(chunks), n_seq, kind)
        out = step.buffer(n_q)
        logits = step.vector(sinks) if sinks is not None else None
        parts = qkv.columns(0, n_q), qkv.columns(n_q, n_kv), qkv.columns(n_q + n_kv, n_kv)
        step.add(Attend(*parts, self.cache, shape, out, logits))
        step.finish(out)

    def turned(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return x if self.rotation is None else rotate(x.astype(np.float64), self.rotation, positions)

    def check_rows(self, result: np.ndarray, tokens: np.ndarray, positions: np.ndarray, seq: int = 0) -> None:
        """Rows that a step has made, against float64 with what is stored now."""
        shape, k_rows, v_rows = self.shape, self.cache.k, self.cache.v
        n, first = positions[-1] + 1, max(0, positions[-1] + 1 - self.cache.n_ctx)
        k, v = (np.zeros((n, shape.n_head_kv, shape.head_dim)) for _ in "kv")
        slots = np.arange(first, n) % self.cache.n_ctx
        k[first:], v[first:] = stored(k_rows, seq)[slots], stored(v_rows, seq)[slots]
        h, q = hadamard(shape.head_dim), self.turned(self.q[tokens], positions).astype(np.float64)
        q = q @ h if k_rows.rotates else q
        h = h if v_rows.rotates else np.eye(shape.head_dim)
        limits = shape.scale, shape.window, shape.softcap, self.sinks, shape.is_chunked
        expected = attend(q, k, v, positions, *limits) @ h
        bound = roundings(q, k, v, positions, shape, self.sinks, h)
        difference = np.abs(result.reshape(expected.shape) - expected)
        assert (difference <= bound).all(), (difference - bound).max()
        assert bound.mean() < 2e-3 * np.abs(expected).max()  # or nothing would be tested

    def check(self) -> None:
        n_past = 0
        for n in self.chunks:
            result, positions = self.step.run(n, n_past, n_past), n_past + np.arange(n)
            self.check_rows(result, positions, positions)
            n_past += n


@pytest.mark.parametrize(("k", "v"), PAIRS)
def test_attention_over_what_is_stored(k: str, v: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token, some and many, over several parts of the positions; the rows that are stored."""
    monkeypatch.setattr(attention_launch, "SPAN", 32)
    case = Case(CacheType(k, v, False), AttentionShape(3, 1, 64, 0.2))
    case.check()
    for rows, values in ((case.cache.k, case.k), (case.cache.v, case.v)):
        if rows.type.name == "bf16":
            assert (np.abs(stored(rows)[: len(values)] - values) <= 2.0**-8 * np.abs(values)).all()
        else:
            twin = {"f32": np.float32, "f16": np.float16, **TWINS}[rows.type.name]
            np.testing.assert_array_equal(stored(rows)[: len(values)], twin(values))


@pytest.mark.parametrize("style", ["norm", "neox"])
@pytest.mark.parametrize(("k", "v", "head_dim", "n_rot"), [("f16", "q4_0", 96, 40), ("q8_0", "f16", 32, 32)])
def test_rope_and_rotation(style: str, k: str, v: str, head_dim: int, n_rot: int) -> None:
    """Both are done by the kernel that appends; a shift turns stored keys."""
    rotation = Rotation(style, n_rot, 1e4 ** -(np.arange(n_rot // 2) / n_rot * 2), 1.3)
    case = Case(CacheType(k, v), AttentionShape(3, 1, head_dim, 0.1), rotation=rotation, chunks=(40, 3, 1))
    case.check()
    assert (case.cache.k.rotates, case.cache.v.rotates) == (k != "f16", v != "f16")
    before = stored(case.cache.k), stored(case.cache.v)
    case.cache.shift(0, 44, 0, 32, Rotation(style, n_rot, rotation.inv_freq))
    h = hadamard(head_dim) if case.cache.k.rotates else np.eye(head_dim)
    turned = rotate(before[0][32:44] @ h, Rotation(style, n_rot, rotation.inv_freq), np.full(12, -32)) @ h
    assert error(stored(case.cache.k)[:12], turned) < (0.02 if k == "q8_0" else 1e-3)
    assert np.array_equal(stored(case.cache.v)[:12], before[1][32:44])


@pytest.mark.parametrize(("window", "is_chunked"), [(20, False), (24, True)])
def test_window_softcap_and_sinks(window: int, is_chunked: bool) -> None:
    """The ring goes round; a window that ends within a tile; sinks that no score reaches and that all do."""
    shape = AttentionShape(2, 1, 32, 0.2, window, 5.0, is_chunked)
    case = Case(CacheType("int8", "q8_0"), shape, sinks=np.array([0.5, 90]), chunks=(1, 50, 50, 40, 1))
    assert case.cache.n_ctx < sum(case.chunks)
    case.check()


def test_static_scales() -> None:
    scales = (0.02, 0.5)
    case = Case(CacheType("fp8_e4m3", "int8", None, scales, scales), AttentionShape(2, 2, 64, 0.1), chunks=(9, 1))
    case.check()
    assert not case.cache.k.rotates
    assert np.array_equal(case.cache.k.d[0, :, :10, 0].cpu(), np.array(scales, np.float16)[:, None].repeat(10, 1))


@pytest.mark.parametrize("head_dim", [40, 80])
def test_head_sizes_that_are_no_powers_of_two(head_dim: int) -> None:
    Case(CacheType("f16", "int8"), AttentionShape(3, 1, head_dim, 0.1), chunks=(10, 1)).check()
    for name in ("q8_0", "q4_0", "f64"):
        with pytest.raises(OptionError, match=f"cache type {name}"):
            gpu().cache(AttentionShape(1, 1, head_dim, 1.0), 64, 8, 1, CacheType(name, "f16"))


def test_several_sequences() -> None:
    """Tokens of three sequences in one tile, and one token of each."""
    case = Case(CacheType("q8_0", "f16"), AttentionShape(4, 2, 32, 0.2), chunks=(20, 3), n_seq=3)
    runs = [Run(2, 0, 7), Run(0, 0, 9), Run(1, 0, 4)]
    ids = np.arange(20, dtype=np.int32)
    result = case.step.program.run(ids, runs, range(20)).values.copy()
    at = 0
    for seq, n_past, n, *_ in runs:
        case.check_rows(result[at : at + n], ids[at : at + n], n_past + np.arange(n), seq)
        at += n
    runs = [Run(1, 4, 1), Run(0, 9, 1), Run(2, 7, 1)]
    result = case.step.program.run(np.arange(20, 23, dtype=np.int32), runs, range(3)).values
    for i, (seq, position, *_) in enumerate(runs):
        case.check_rows(result[i], np.array([20 + i]), np.array([position]), seq)


@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_what_is_read_can_be_written(name: str) -> None:
    cache: GpuCache = gpu().cache(AttentionShape(2, 2, 64, 1.0, window=50), 1000, 14, 2, CacheType(name, name))
    assert cache.n_ctx == 128
    rng = np.random.default_rng(1)
    for plane in cache.k.planes:
        shape = plane.view(torch.uint8).shape
        plane.view(torch.uint8)[:] = torch.from_numpy(rng.integers(0, 100, shape, np.uint8)).to(plane.device)
    data = cache.read(0, "k", 2, 6)
    assert cache.write(1, "k", 6, data[1:]) is None
    assert cache.write(1, "k", 6, data) == 2
    for plane in cache.k.planes:
        assert torch.equal(plane[0], plane[1])
    cache.copy(0, 1, 50)
