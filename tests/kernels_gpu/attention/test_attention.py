"""Attention and KV caches of all types on the GPU backend, in Triton's interpreter, against float64 NumPy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from cache_twins import TWINS, hadamard
from cpu_ops import Step, error
from gpu_ops import fast_dots, gpu, pytestmark, torch, use_tuning
from numpy_backend import attend, rotate, softmax, visible
from paged import mixed_table, places

from gguf_run.formats.blocks.grids import codebook
from gguf_run.kernels_gpu.attention import launch as attention_launch
from gguf_run.kernels_gpu.attention.cache import GpuCache, Rows
from gguf_run.kernels_gpu.attention.cache_types import CACHE_FORMATS
from gguf_run.models.backend import CacheType, Run
from gguf_run.models.kv_cache import GROUP
from gguf_run.models.operands import AttentionShape, Rotation
from gguf_run.models.ops import Attend, Rope
from gguf_run.models.pages import PAGE, PageTable

__all__ = ["fast_dots", "pytestmark"]
PAIRS = (("f16", "bf16"), ("q8_0", "q4_0"), ("q4_0", "int8"), ("int8", "q8_0"), ("fp8_e4m3", "fp8_e5m2"))
PAIRS += (("bf16", "fp8_e4m3"), ("fp8_e5m2", "f32"), ("f32", "f16"))
PAIRS += (("q5_0", "q4_1"), ("q4_1", "iq4_nl"), ("q5_1", "int4"), ("int4", "q5_0"))
OFFSETS = {"q4_0": 8, "int4": 8, "q5_0": 16, "q4_1": 0, "q5_1": 0, "iq4_nl": 0}  # of codes without sign
CHUNKS = (3, 40, 1)
U = 2.0**-11  # the most that one f16 is off, relative
SIGMAS = 5


def stored(table: PageTable, rows: Rows, n: int, seq: int = 0) -> np.ndarray:
    """The first n rows of a sequence as they are stored, without turning them back: float64[n, n_head_kv, head_dim]."""
    at = places(table, seq, np.arange(n))
    qs, name = rows.qs[:, at].cpu().numpy(), rows.type.name
    d = None if rows.d is None else rows.d[:, at].cpu().numpy().astype(np.float64)
    if name in OFFSETS:
        byte = qs[..., : rows.head_dim // 2].reshape(*qs.shape[:-1], -1, 1, 16)
        codes = np.concatenate([byte & 15, byte >> 4], -2).reshape(*qs.shape[:-1], -1).astype(int)
        if name.startswith("q5"):
            high = qs[..., rows.head_dim // 2 :].reshape(*qs.shape[:-1], -1, 1, 4)
            codes += 16 * (high >> np.arange(8)[:, None] & 1).reshape(codes.shape)
        codes = codebook("iq4_nl")[codes] if name == "iq4_nl" else codes - OFFSETS[name]
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
    if name.endswith("_1"):
        d, minimum = d[..., ::2], d[..., 1::2]
    if d is not None:
        values *= np.repeat(d, values.shape[-1] // d.shape[-1], -1)
    if name.endswith("_1"):
        values += np.repeat(minimum, values.shape[-1] // d.shape[-1], -1)
    return values.astype(np.float32).astype(np.float64).transpose(1, 0, 2)


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
    off = np.empty((*q.shape[:2], v.shape[-1]))
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
        self.table = mixed_table(n, n_seq, shape.window)
        self.cache: GpuCache = step.backend.cache(shape, self.table, kind)
        out = step.buffer(shape.n_head * shape.n_value)
        logits = step.vector(sinks) if sinks is not None else None
        values = qkv.columns(n_q, shape.n_latent) if shape.n_latent else qkv.columns(n_q + n_kv, n_kv)
        parts = qkv.columns(0, n_q), qkv.columns(n_q, n_kv), values
        step.add(Attend(*parts, self.cache, shape, out, logits))
        step.finish(out)

    def turned(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return x if self.rotation is None else rotate(x.astype(np.float64), self.rotation, positions)

    def check_rows(self, result: np.ndarray, tokens: np.ndarray, positions: np.ndarray, seq: int = 0) -> None:
        """Rows that a step has made, against float64 with what is stored now."""
        shape, k_rows, v_rows = self.shape, self.cache.k, self.cache.v
        k, v = (stored(self.table, rows, positions[-1] + 1, seq) for rows in (k_rows, v_rows))
        v = v[..., : shape.n_value]
        h, q = hadamard(shape.head_dim), self.turned(self.q[tokens], positions).astype(np.float64)
        q = q @ h if k_rows.rotates else q
        h = h if v_rows.rotates else np.eye(shape.n_value)
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
        held = stored(case.table, rows, len(values))
        if rows.type.name == "bf16":
            assert (np.abs(held - values) <= 2.0**-8 * np.abs(values)).all()
        else:
            twin = {"f32": np.float32, "f16": np.float16, **TWINS}[rows.type.name]
            np.testing.assert_array_equal(held, twin(values))


@pytest.mark.parametrize("style", ["norm", "neox"])
@pytest.mark.parametrize(("k", "v", "head_dim", "n_rot"), [("f16", "q4_0", 96, 40), ("q5_1", "f16", 32, 32)])
def test_rope_and_rotation(style: str, k: str, v: str, head_dim: int, n_rot: int) -> None:
    """Both are done by the kernel that appends; a move turns stored keys."""
    rotation = Rotation(style, n_rot, 1e4 ** -(np.arange(n_rot // 2) / n_rot * 2), 1.3)
    case = Case(CacheType(k, v), AttentionShape(3, 1, head_dim, 0.1), rotation=rotation, chunks=(40, 3, 1))
    case.check()
    assert (case.cache.k.rotates, case.cache.v.rotates) == (k != "f16", v != "f16")
    keys, values = (stored(case.table, rows, 44) for rows in (case.cache.k, case.cache.v))
    groups = places(case.table, 0, np.array([0, 32])) // GROUP
    case.cache.move(groups[1:], groups[:1], Rotation(style, n_rot, rotation.inv_freq), -32)
    h = hadamard(head_dim) if case.cache.k.rotates else np.eye(head_dim)
    turned = rotate(keys[32:] @ h, Rotation(style, n_rot, rotation.inv_freq), np.full(12, -32)) @ h
    assert error(stored(case.table, case.cache.k, 12), turned) < (0.05 if k == "q5_1" else 1e-3)
    assert np.array_equal(stored(case.table, case.cache.v, 12), values[32:])


@pytest.mark.parametrize("name", ["f16", "int8"])
def test_latent_keys_turn_at_their_end(name: str) -> None:
    """Values are columns of the keys: they are there once, and stay as they are."""
    table, rng = mixed_table(128), np.random.default_rng(5)
    cache = gpu().cache(AttentionShape(4, 1, 48, 1.0, n_latent=32), table, CacheType(name, name))
    assert (cache.kinds, cache.k.rotates) == ("k", False)
    cache.k.qs.view(torch.float16 if name == "f16" else torch.int8).copy_(
        torch.from_numpy(rng.integers(-100, 100, (1, table.n_pages * PAGE, 48)))
    )
    if cache.k.d is not None:
        cache.k.d.fill_(0.25)
    rotation = Rotation("norm", 16, 1e4 ** -(np.arange(8) / 8))
    before = stored(table, cache.k, 128)
    groups = places(table, 0, np.arange(0, 128, GROUP)) // GROUP
    cache.move(groups[1:], groups[:-1], rotation, -32)
    expected = before[32:].copy()
    expected[..., 32:] = rotate(expected[..., 32:], rotation, np.full(96, -32))
    assert error(stored(table, cache.k, 96), expected) < (1e-3 if name == "f16" else 0.01)
    assert np.array_equal(stored(table, cache.k, 128)[96:], before[96:])


@pytest.mark.parametrize(("k", "v", "window", "is_chunked"), [("int8", "q8_0", 20, False), ("q4_1", "q5_0", 24, True)])
def test_window_softcap_and_sinks(k: str, v: str, window: int, is_chunked: bool) -> None:
    """A window that begins within a page; pages behind the window; sinks that no score reaches and that all do."""
    shape = AttentionShape(2, 1, 32, 0.2, window, 5.0, is_chunked)
    case = Case(CacheType(k, v), shape, sinks=np.array([0.5, 90]), chunks=(1, 50, 50, 40, 1))
    case.check()


def test_static_scales() -> None:
    scales = (0.02, 0.5)
    case = Case(CacheType("fp8_e4m3", "int8", None, scales, scales), AttentionShape(2, 2, 64, 0.1), chunks=(9, 1))
    case.check()
    assert not case.cache.k.rotates
    at = places(case.table, 0, np.arange(10))
    assert np.array_equal(case.cache.k.d[:, at, 0].cpu(), np.array(scales, np.float16)[:, None].repeat(10, 1))


@pytest.mark.parametrize(
    ("k", "v", "head_dim"),
    [("f16", "int8", 40), ("f16", "int8", 80), ("q5_0", "q4_1", 96), ("iq4_nl", "q5_1", 128), ("q5_1", "int4", 256)],
)
def test_head_sizes(k: str, v: str, head_dim: int) -> None:
    Case(CacheType(k, v), AttentionShape(3, 1, head_dim, 0.1), chunks=(10, 1)).check()


@pytest.mark.parametrize("name", ["q5_0", "iq4_nl"])
def test_latent_rows(name: str) -> None:
    """Values are the first columns of the keys. These are not whole operands."""
    Case(CacheType(name), AttentionShape(4, 1, 96, 0.1, n_latent=80), chunks=(10, 1)).check()


def check_runs(case: Case, runs: Sequence[Run], ids: np.ndarray) -> None:
    """A step of several sequences."""
    result = case.step.program.run(ids.astype(np.int32), runs, range(len(ids))).values.copy()
    at = 0
    for seq, n_past, n, *_ in runs:
        case.check_rows(result[at : at + n], ids[at : at + n], n_past + np.arange(n), seq)
        at += n


def test_several_sequences() -> None:
    """Tiles of tokens of one sequence each; one token of each sequence, more of them than a graph has."""
    case = Case(CacheType("q8_0", "f16"), AttentionShape(4, 2, 32, 0.2), chunks=(48, 12), n_seq=12)
    check_runs(case, [Run(2, 0, 7), Run(11, 0, 37), Run(4, 0, 4)], np.arange(48))
    check_runs(case, [Run(4, 4, 1), Run(11, 37, 1), Run(2, 7, 1)], np.arange(48, 51))
    alone = [Run(seq, 0, 1) for seq in (0, 1, 3, 5, 6, 7, 8, 9)]
    check_runs(case, [*alone[:4], Run(11, 38, 2), Run(4, 5, 1), *alone[4:]], np.arange(49, 60))


PAST = (0, 1, 62, 63, 64, 126, 127, 128, 200, 301, 440)


@pytest.mark.parametrize(("programs", "window", "is_chunked"), [(264, 0, False), (90, 70, False), (1, 48, True)])
def test_many_sequences(programs: int, window: int, is_chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """33 sequences of all lengths with one token or guesses, then a part of a prompt among answers: one part for each,
    or one for each block, or some for the long ones. What earlier steps have left in scratch memory is not read."""
    use_tuning(monkeypatch, programs=programs)
    shape = AttentionShape(2, 1, 32, 0.2, window, 0, is_chunked)
    case = Case(CacheType("f16", "f16"), shape, chunks=(60, 400), n_seq=33)
    rng, n_guess, step = np.random.default_rng(programs), {3: 2, 9: 16, 20: 7}, case.step.program.memory.step
    for rows in (case.cache.k, case.cache.v):
        rows.qs.view(torch.float16).copy_(torch.from_numpy(rng.standard_normal((*rows.qs.shape[:2], 32))))
    answers = [Run(seq, PAST[seq % len(PAST)], n_guess.get(seq, 1)) for seq in range(33)]
    mixed = [Run(7, 0, 1), Run(32, 65, 45), Run(5, 440, 3), Run(6, 127, 1)]
    for runs in (answers, mixed):
        for name in ("sums", "stats"):
            case.step.program.memory.scratch[name].fill_(float("nan"))
        ids = np.arange(sum(run.n_tokens for run in runs))
        result, at = case.step.program.run(ids.astype(np.int32), runs, range(len(ids))).values, 0
        for seq, n_past, n, *_ in runs:
            positions, own = n_past + np.arange(n), slice(at, at + n)
            k, v = (stored(case.table, rows, n_past + n, seq) for rows in (case.cache.k, case.cache.v))
            expected = attend(case.q[own].astype(np.float64), k, v, positions, 0.2, window, 0, None, is_chunked)
            assert error(result[own], expected.reshape(n, -1)) < 3e-3  # of f16
            at += n
        assert step.is_wide[False] == (runs is mixed)
        parts = {n_part for items in step._items.values() for _, n, _, n_part, _ in items.rows.tolist() if n}
        assert max(parts) == {264: 7, 90: 3, 1: 1}[programs]


def test_sequences_that_share_pages() -> None:
    """The rows of a table that change between steps; a copy of a page that goes on in another way."""
    case = Case(CacheType("f16", "q8_0", False), AttentionShape(4, 2, 64, 0.1), chunks=(80, 30), n_seq=3)
    table = case.table
    check_runs(case, [Run(0, 0, 80)], np.arange(80))
    free = sorted({*range(table.n_pages)} - {*table.pages[0].tolist()})
    case.cache.copy(int(table.pages[0, 1]), free[0])
    table.pages[2], table.pages[1] = [table.pages[0, 0], free[0]], [table.pages[0, 0], free[1]]
    table.versions[[1, 2]] += 1
    check_runs(case, [Run(2, 75, 1), Run(0, 80, 2), Run(1, 64, 20)], np.arange(80, 103))
    assert np.array_equal(*(stored(table, case.cache.k, 75, seq) for seq in (0, 2)))


def test_pages_behind_the_window_are_not_read() -> None:
    """Another sequence may have them: what is there is no number."""
    case = Case(CacheType("f32", "f16"), AttentionShape(2, 1, 32, 0.2, window=40), chunks=(110, 12), n_seq=1)
    case.check()
    chunks = ((1, 102), (1, 103), (12, 103))  # the window of position 103 begins with a page
    before = [case.step.run(n, n_past, 110) for n, n_past in chunks]
    for rows in (case.cache.k, case.cache.v):
        rows.qs[:, places(case.table, 0, np.arange(PAGE))] = 255
    after = [case.step.run(n, n_past, 110) for n, n_past in chunks]
    assert [np.array_equal(*pair) for pair in zip(before, after, strict=True)] == [False, True, True]


@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_groups_that_are_read_written_copied_and_moved(name: str) -> None:
    cache: GpuCache = gpu().cache(AttentionShape(2, 2, 64, 1.0), mixed_table(128), CacheType(name, name))
    rng = np.random.default_rng(1)
    for plane in cache.k.planes:
        shape = plane.view(torch.uint8).shape
        plane.view(torch.uint8)[:] = torch.from_numpy(rng.integers(0, 100, shape, np.uint8)).to(plane.device)

    def planes() -> list[np.ndarray]:
        """The groups of each plane: [2, 10, 32, elements]."""
        return [plane.cpu().numpy().reshape(2, 10, GROUP, -1) for plane in cache.k.planes]

    before = [plane.copy() for plane in planes()]
    source = np.array([7, 3, 4])
    data = cache.read("k", source)
    assert len(data) == 3 * cache.group_bytes("k")
    cache.write("k", np.array([0, 9]), data)  # the last two of three
    cache.copy(1, 3)
    for old, new in zip(before, planes(), strict=True):
        assert np.array_equal(new[:, [0, 9, 6, 7, 8]], old[:, [3, 4, 2, 3, 8]])
    cache.move(np.array([1, 2, 3]), np.array([2, 3, 5]), None, 0)
    for old, new in zip(before, planes(), strict=True):
        assert np.array_equal(new[:, [1, 2, 3, 5, 4]], old[:, [1, 1, 2, 3, 4]])
    cache.write("k", source[:0], cache.read("k", source[:0]))
