"""The ops of the GPU backend in Triton's interpreter, against float64 NumPy: awkward shapes, few and many tokens."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from adapter_ops import compare
from cpu_ops import MemoryTensor, Step, as_quantized, error, quantize_twin, random_tensor, weights_of
from gpu_ops import DEVICE, INTERPRETED, fast_dots, gpu, only_interpreted, pytestmark, use_tuning
from numpy_backend import ACTIVATIONS, NumpyBackend, rotate
from paged import mixed_table
from stream_ops import streams
from triton.runtime import interpreter

from gguf_run.formats.errors import UnsupportedError
from gguf_run.kernels_gpu.buffers import Memory
from gguf_run.kernels_gpu.device.tuning import FEW, Tuning
from gguf_run.kernels_gpu.fuse import Convert
from gguf_run.kernels_gpu.launch import bind
from gguf_run.kernels_gpu.matmul import launch as matmul
from gguf_run.kernels_gpu.panels import dots
from gguf_run.kernels_gpu.panels.halves import half_word, mma, scaled_bytes
from gguf_run.kernels_gpu.panels.panels import PANELS, FloatPanel, IntPanel
from gguf_run.models.backend import CacheType, Run, Top
from gguf_run.models.operands import AttentionShape, Buffer, Rotation
from gguf_run.models.ops import Attend, Embed, Gated, Matmul, MatmulGated, Observe, RmsNorm, Rope
from gguf_run.models.rare_ops import GateRows, LayerNorm, MatmulHeads, Softcap, Temper, Xielu
from gguf_run.models.temperature import Temperature

__all__ = ["fast_dots", "pytestmark"]
INTEGER = [name for name, panel in PANELS.items() if isinstance(panel, IntPanel)]
FLOAT = [name for name, panel in PANELS.items() if isinstance(panel, FloatPanel)]
GUARD = np.float32(-777.25)
MANY = () if INTERPRETED else (2, 4, 8, 9, 16, 17, 32, 33, 64, 100)  # more numbers of tokens, where that costs little
EXACT, HALF = 1e-5, 2e-3  # float32 sums; products of numbers with 11 bits


def check_matmul(
    tensors: Sequence[MemoryTensor], tokens: Sequence[int], activation: str = "", bias: bool = True
) -> None:
    """One program with bias and residual, run for several numbers of tokens; out stands between columns that must not
    change. Few tokens are multiplied as int8 if the weights are quantized, many as f16."""
    rng, n_batch = np.random.default_rng(7), max(tokens)
    w = weights_of(tensors)
    n_out, n_in = w.shape
    x = (rng.standard_normal((n_batch, n_in)) * np.exp(rng.standard_normal((n_batch, 1)))).astype(np.float32)
    is_quantized = np.concatenate([np.full(t.n_rows, t.type.name in INTEGER) for t in tensors])
    q8 = as_quantized(x) if is_quantized.any() else x
    step = Step(gpu(), n_batch)
    weight = step.backend.weight(tensors)
    assert (weight.n_in, weight.n_out) == (n_in, n_out)
    shift = rng.standard_normal(n_out).astype(np.float32) * bias
    vector = step.vector(shift) if bias else None
    n = n_out // 2 if activation else n_out
    residual = 0.1 * rng.standard_normal((n_batch, n)).astype(np.float32)
    wide = step.input(np.full((n_batch, n + 20), GUARD))
    out = wide.columns(8, n)
    if activation:
        step.add(MatmulGated(step.input(x), weight, out, activation, vector))
    else:
        step.add(Matmul(step.input(x), weight, out, vector, step.input(residual, out)))
    step.finish(wide)
    for n_tokens in tokens:
        few = n_tokens <= FEW
        exact = x.astype(np.float64) @ w.T
        expected = (np.where(is_quantized, q8 @ w.T, exact) if few else exact) + shift
        gated = activation and ACTIVATIONS[activation](expected[:, :n]) * expected[:, n:]
        expected = gated if activation else expected + residual
        result = step.run(n_tokens)
        assert error(result[:, 8 : 8 + n], expected[:n_tokens]) < (EXACT if few else HALF), n_tokens
        assert (result[:, :8] == GUARD).all()
        assert (result[:, 8 + n :] == GUARD).all()


@pytest.mark.parametrize("name", INTEGER)
def test_matmul_of_integer_panels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trips and a rest, a last program with rows that are not there; by tiles in registers and in memory."""
    use_tuning(monkeypatch, small=16)
    monkeypatch.setattr(matmul, "SCRATCH", 5 * 768)
    n_in = 768 if PANELS[name].unit == 64 or "_K" in name or name == "IQ4_XS" else 32 * 35
    check_matmul([random_tensor(name, 7, n_in)], (1, 9, 17, *MANY))


@pytest.mark.parametrize("name", FLOAT)
@pytest.mark.parametrize("n_in", [7, 300])
def test_matmul_of_float_panels(name: str, n_in: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tuning(monkeypatch, small=16)
    check_matmul([random_tensor(name, 9, n_in)], (1, 3, 9, 17, *MANY))


@pytest.mark.parametrize(
    ("name", "n_out", "n_in", "tokens"),
    [("Q4_K", 150, 1280, (16,)), ("Q6_K", 9, 1024, (33, 66)), ("Q4_1", 30, 1120, (64,)), ("Q2_K", 5, 1024, (100,))],
)
def test_matmul_in_parts(
    name: str, n_out: int, n_in: int, tokens: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of weights in two parts, which may differ, and in two programs; tokens in one program and in two."""
    use_tuning(monkeypatch, small=128)
    check_matmul([random_tensor(name, n_out, n_in)], tokens)


@only_interpreted
def test_parts_are_added_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits whichever part's program is the last one. Twice: the counts are 0 again."""
    use_tuning(monkeypatch, small=128)
    rng, tensor = np.random.default_rng(1), random_tensor("Q4_K", 9, 1024)
    step, order = Step(gpu(), 9), list[int]()
    out = step.buffer(9)
    step.add(Matmul(step.input(rng.standard_normal((9, 1024))), step.backend.weight([tensor]), out))
    step.finish(out)
    results = [step.run(9) for _ in range(2)]
    builder = interpreter.interpreter_builder
    place = builder.set_grid_idx

    def place_last_first(x: int, y: int, z: int) -> None:
        order.append(builder.grid_dim[2] - 1 - z)
        place(x, y, order[-1])

    monkeypatch.setattr(builder, "set_grid_idx", place_last_first)
    results.append(step.run(9))
    assert 1 in order
    assert all(np.array_equal(result, results[0]) for result in results)


@pytest.mark.parametrize("name", ["Q4_K", "Q3_K", "Q6_K", "Q8_0"])
def test_matmul_of_a_few_tokens(name: str) -> None:
    check_matmul([random_tensor(name, 3, 256)], (2, 3, 8, 33))


def test_matmul_of_stacked_types() -> None:
    check_matmul(
        [random_tensor(name, n, 256) for name, n in (("Q4_K", 5), ("Q6_K", 2), ("F16", 3))], (1, 9), bias=False
    )


@pytest.mark.parametrize(
    ("activation", "types"), [("silu", ("Q4_0", "Q4_0")), ("gelu", ("Q4_0", "Q8_0")), ("gelu", ("Q8_0", "Q8_0"))]
)
@pytest.mark.parametrize(("small", "tokens"), [(0, (1, 2, 9)), (128, (9,))])
def test_matmul_gated(
    activation: str, types: Sequence[str], small: int, tokens: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tuning(monkeypatch, small=small)
    check_matmul([random_tensor(name, 11 if small else 3, 96, i) for i, name in enumerate(types)], tokens, activation)


def test_fallbacks_of_dot_products() -> None:
    """The plain Triton of what is one instruction on NVIDIA GPUs: books of values, four and two products at a time."""
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(a, b, out, BOOK: tl.constexpr):  # type: ignore[no-untyped-def]
        i = tl.arange(0, 64)
        x, y = tl.load(a + i), tl.load(b + i)
        low, high = dots.look_up(x, BOOK)
        tl.store(out + i, dots.dp4a(x, y, y))
        tl.store(out + 64 + i, dots.dp2a(x, y, 0))
        tl.store(out + 128 + i, dots.dp2a(x, y, 1))
        tl.store(out + 192 + i, low)
        tl.store(out + 256 + i, high)

    rng = np.random.default_rng(1)
    a, b = rng.integers(-(2**31), 2**31, (2, 64), np.int32)
    book = rng.integers(-128, 128, 16).astype(np.int8)
    made = torch.zeros(5, 64, dtype=torch.int32, device=DEVICE)
    x, y = (torch.from_numpy(words).to(DEVICE) for words in (a, b))
    kernel[(1,)](x, y, made, tuple(book.view(np.int32).tolist()))
    out = made.cpu()
    bytes_a, bytes_b, pairs = (x.astype(np.int64) for x in (_view(a, np.int8), _view(b, np.int8), _view(a, np.int16)))
    assert np.array_equal(out[0], ((bytes_a * bytes_b).sum(1) + b).astype(np.int32))
    assert np.array_equal(out[1], (pairs * bytes_b[:, :2]).sum(1))
    assert np.array_equal(out[2], (pairs * bytes_b[:, 2:]).sum(1))
    codes = _view(a, np.uint8)
    assert np.array_equal(_view(out[3].numpy(), np.int8), book[codes & 15])
    assert np.array_equal(_view(out[4].numpy(), np.int8), book[codes >> 4])


def test_tensor_core_products() -> None:
    """mma, as PTX spreads its operands over threads, and f16 of bytes, for two warps. Without a GPU: plain Triton."""
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(a, b, c, words, factors, sums, made):  # type: ignore[no-untyped-def]
        i = tl.arange(0, 64)
        a_words = (tl.load(a + i), tl.load(a + 64 + i), tl.load(a + 128 + i), tl.load(a + 192 + i))
        before = (tl.load(c + i), tl.load(c + 64 + i), tl.load(c + 128 + i), tl.load(c + 192 + i))
        total = mma(a_words, (tl.load(b + i), tl.load(b + 64 + i)), before)
        for k in tl.static_range(4):
            tl.store(sums + k * 64 + i, total[k])
        scale, minimum = tl.load(factors + i), tl.load(factors + 64 + i)
        low, high = scaled_bytes(tl.load(words + i), half_word(scale, scale), half_word(minimum, minimum), 8)
        tl.store(made + 2 * i, low)
        tl.store(made + 2 * i + 1, high)

    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((4, 64, 2)).astype(np.float16), rng.standard_normal((2, 64, 2)).astype(np.float16)
    c, factors = rng.standard_normal((4, 64)).astype(np.float32), rng.standard_normal((2, 64)).astype(np.float16)
    words = rng.integers(-(2**31), 2**31, 64, np.int32)
    sums, made = torch.zeros(4, 64, device=DEVICE), torch.zeros(128, dtype=torch.int32, device=DEVICE)
    arrays = a.view(np.int32), b.view(np.int32), c, words, factors.astype(np.float32)
    kernel[(1,)](*(torch.from_numpy(array).to(DEVICE) for array in arrays), sums, made, num_warps=2)
    thread = np.arange(64)
    warp, g, q = thread // 32, thread % 32 // 4, thread % 4
    left, right, total = np.zeros((2, 16, 16)), np.zeros((2, 16, 8)), np.zeros((2, 16, 8))
    for k, half in np.ndindex(4, 2):
        left[warp, g + k % 2 * 8, 2 * q + half + k // 2 * 8] = a[k, :, half]
        total[warp, g + k // 2 * 8, 2 * q + k % 2] = c[k]
        if k < 2:
            right[warp, 2 * q + half + k * 8, g] = b[k, :, half]
    total += left @ right
    expected = np.stack([total[warp, g + k // 2 * 8, 2 * q + k % 2] for k in range(4)])
    assert np.abs(sums.cpu().numpy() - expected).max() < EXACT
    exact = (_view(words, np.uint8) - 8.0) * factors[0][:, None] + factors[1][:, None]
    assert np.array_equal(made.cpu().numpy().view(np.float16).reshape(64, 4), exact.astype(np.float16))


def _view(words: np.ndarray, dtype: Any) -> np.ndarray:
    return words[:, None].view(dtype)


def test_activations() -> None:
    """int8 blocks with the CPU's roundings, and their sums; halves with a factor for each row; zeros stay zeros.

    Halves in both orders, with zeros behind the columns."""
    import torch

    rng = np.random.default_rng(3)
    x = (rng.standard_normal((3, 1120)) * np.exp(rng.standard_normal((3, 1120)))).astype(np.float32)
    x[1, 64:128], x[2] = 0, 0
    made = []
    for small in (0, 3):
        memory, buffer = Memory(DEVICE, Tuning(small=small), 3, 1), Buffer.whole("x", 1128).columns(8, 1120)
        memory.rows(buffer)[:3] = torch.from_numpy(x)
        for launch in bind([Convert(buffer, "int8"), Convert(buffer, "halves")], memory):
            launch(3)
        int8, halves = memory.int8(buffer), memory.halves(buffer)
        made.append(halves.xh)
    d, q = quantize_twin(x)
    xq, xd, xs, xh, xm = (form[:3].cpu().numpy() for form in (*int8, made[0], halves.xm))
    assert np.array_equal(xd, d)
    assert np.array_equal(xq.view(np.int8).reshape(q.shape), q)
    assert np.array_equal(xs.view(np.int16).reshape(3, -1), q.reshape(3, -1, 16).sum(2))
    assert np.array_equal(xm, np.abs(x).max(1))
    assert np.abs(xh[:, :1120] * xm[:, None] - x).max() <= np.abs(x).max() * 2.0**-11
    assert (xh[:, 1120:] == 0).all()
    fragments = made[1].view(5, 4, 8, 8, 4, 8)  # of 256 columns, 8 rows: 8 columns of each row and each run of 64
    assert torch.equal(fragments.permute(1, 3, 0, 4, 2, 5).reshape(32, 1280), made[0])


@pytest.mark.parametrize("name", [*PANELS, "IQ2_S"])
def test_embed(name: str) -> None:
    n_in = 40 if name in FLOAT else 768
    table = random_tensor(name, 5, n_in)
    step = Step(gpu(), 4)
    out = step.buffer(n_in)
    step.add(Embed(step.backend.table(table), out, 3.0))
    program = step.finish(out).program
    ids = np.array([4, 0, 4], np.int32)
    result = program.run(ids, [Run(0, 0, 3)], [2, 1]).values
    expected = 3 * weights_of([table])[ids]
    assert error(result, expected[[2, 1]]) < 1e-6
    assert error(program.more([1]), expected[[1]]) < 1e-6
    assert program.run(ids, [Run(0, 0, 3)], ()).values.shape == (0, n_in)


def both(record: Any, runs: Sequence[tuple[int, int]], bound: float = EXACT) -> None:
    """The same ops on the NumPy backend in float64. runs: n_past and the number of tokens, up to 12."""
    programs = [record(Step(backend, 12)) for backend in (gpu(), NumpyBackend(np.float64, np.float16))]
    for n_past, n in runs:
        actual, expected = (program.run(n, n_past) for program in programs)
        assert error(actual, expected) < bound, n_past


@pytest.mark.parametrize(("n_group", "residual", "is_grouped"), [(1, False, False), (3, True, False), (3, False, True)])
def test_rms_norm(n_group: int, residual: bool, is_grouped: bool) -> None:
    rng = np.random.default_rng(5)
    x, more, weight = rng.standard_normal((3, 12, 84))

    def record(step: Step) -> Step:
        a, b = step.input(x), step.input(more)
        part = step.vector(weight[0, : 84 if is_grouped else 84 // n_group])
        step.add(RmsNorm(a, part, a, 0.01, n_group, b if residual else None, is_grouped))
        return step.finish(a)

    both(record, [(0, 1), (0, 12)])


@pytest.mark.parametrize("type_name", ["Q8_0", "F16"])
def test_what_rms_norm_makes_is_multiplied(type_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm writes int8 or halves itself, for two matrices, and once more after its output has changed.

    Halves in the order of rows, and then as fragments, in the same memory."""
    use_tuning(monkeypatch, small=12)
    rng = np.random.default_rng(6)
    x, weight = rng.standard_normal((20, 64)).astype(np.float32), rng.standard_normal(64)
    tensors = [random_tensor(type_name, 4, 64, i) for i in range(2)]
    step = Step(gpu(), 20)
    a, h, one, two, three = step.input(x), *(step.buffer(n) for n in (64, 4, 4, 4))
    step.add(RmsNorm(a, step.vector(weight), h, 0.01))
    step.add(Matmul(h, step.backend.weight(tensors[:1]), one))
    step.add(Matmul(h, step.backend.weight(tensors[1:]), two))
    step.add(Gated(h, h, h, "silu"))
    step.add(Matmul(h, step.backend.weight(tensors[1:]), three, residual=two))
    step.finish(three)
    w = weights_of(tensors)[4:]
    normed = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 0.01) * weight.astype(np.float32)
    changed = ACTIVATIONS["silu"](normed) * normed
    for n in (1, 20, 12):
        few = n == 1 and type_name == "Q8_0"
        expected = sum((as_quantized(v) if few else v)[:n] @ w.T for v in (normed, changed))
        assert error(step.run(n), expected) < HALF


def test_what_products_make_is_multiplied() -> None:
    """A product's last program norms its rows, once or twice, with a residual between, and makes int8 of a gated
    product's; twice, with other rows."""
    rng = np.random.default_rng(12)
    x, weight = rng.standard_normal((20, 96)).astype(np.float32), rng.standard_normal(96)
    first, gate_up, down = (random_tensor("Q8_0", *size) for size in ((96, 96), (128, 96), (96, 64)))
    halves = random_tensor("F16", 96, 96)
    step = Step(gpu(), 20)
    b, a, h, g, ff, out = step.input(x), step.input(x), *(step.buffer(n) for n in (96, 96, 64, 96))
    step.add(Matmul(b, step.backend.weight([first]), a, residual=a))
    step.add(RmsNorm(a, step.vector(weight), h, 0.01))
    step.add(Matmul(h, step.backend.weight([first]), g))
    step.add(RmsNorm(g, step.vector(2 * weight), a, 0.01, residual=a))
    step.add(RmsNorm(a, step.vector(weight), h, 0.02))
    step.add(MatmulGated(h, step.backend.weight([gate_up]), ff, "silu"))
    step.add(Matmul(ff, step.backend.weight([down]), out))
    step.add(Matmul(h, step.backend.weight([halves]), out, residual=out))
    step.finish(out)
    w = [weights_of([tensor]) for tensor in (first, gate_up, down, halves)]

    def rms(rows: np.ndarray, eps: float) -> np.ndarray:
        return rows / np.sqrt((rows**2).mean(1, keepdims=True) + eps) * weight.astype(np.float32)

    for n, first_id in ((1, 0), (3, 2), (1, 5), (20, 0)):
        read = as_quantized if n < 20 else lambda values: values
        rows = x[first_id : first_id + n]
        sums = read(rows) @ w[0].T + rows
        added = rms(read(rms(sums, 0.01)) @ w[0].T, 0.01) * 2 + sums
        normed = rms(added, 0.02)
        both = read(normed) @ w[1].T
        made = read(ACTIVATIONS["silu"](both[:, :64]) * both[:, 64:])
        assert error(step.run(n, 0, first_id), made @ w[2].T + normed @ w[3].T) < HALF, n


def test_graphs_are_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from gguf_run.kernels_gpu.program import Launches

    calls: list[Any] = []

    class Graph:
        def replay(self) -> None:
            calls.append("replay")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, *place, **_: contextlib.nullcontext(calls.append(place)))
    place = "pool", "stream"

    def memory_of(device: str) -> Any:
        return SimpleNamespace(device=torch.device(device), capturing=place[::-1])

    for device, capture, expected in (
        ("cuda:1", True, [4, place, 4, "replay", -16, place, -16, "replay", -16, place, -16, "replay", -129, -129]),
        ("cuda", False, [4, 4, -16, -16, -16, -16, -129, -129]),
        ("cpu", True, [4, 4, -16, -16, -16, -16, -129, -129]),
    ):
        calls.clear()
        launches = Launches([calls.append], [lambda n: calls.append(-n)], memory_of(device), capture)
        for n, is_wide in ((3, 0), (4, 0), (9, 0), (16, 0), (10, 1), (9, 1), (129, 1), (129, 0)):
            launches.run(n, bool(is_wide))
        assert calls == expected
    calls.clear()
    Launches([calls.append], [], memory_of("cuda:1"), True).followed_by(lambda n: calls.append(-n)).run(4, False)
    assert calls == [4, -4, place, 4, -4]


@pytest.mark.parametrize("style", ["norm", "neox"])
@pytest.mark.parametrize(("head_dim", "n_rot"), [(10, 10), (32, 20)])
def test_rope(style: str, head_dim: int, n_rot: int) -> None:
    rng = np.random.default_rng(8)
    x = rng.standard_normal((12, 5 * head_dim))
    rotation = Rotation(style, n_rot, 1e4 ** -(np.arange(n_rot // 2) / n_rot * 2), 1.3)

    def record(step: Step) -> Step:
        a = step.input(np.pad(x, ((0, 0), (4, 0)))).columns(4, 5 * head_dim)
        step.add(Rope(a, rotation, head_dim))
        return step.finish(a)

    both(record, [(100_000, 12), (7, 1)])


def test_long_sequences_turn_by_other_frequencies() -> None:
    """Runs of both kinds in one step."""
    x = np.random.default_rng(4).standard_normal((9, 32))
    rotation = Rotation("neox", 16, 1e4 ** -(np.arange(8) / 8), 1.3, 3e3 ** -(np.arange(8) / 8), 64)
    step = Step(gpu(), 9)
    a = step.input(x)
    step.add(Rope(a, rotation, 16))
    step.finish(a)
    runs = [Run(0, 5, 3, False), Run(1, 70, 4, True), Run(2, 1, 2, False)]
    result = step.program.run(np.arange(9, dtype=np.int32), runs, range(9)).values
    at = 0
    for run in runs:
        heads = x[at : at + run.n_tokens].reshape(run.n_tokens, 2, 16)
        expected = rotate(heads, rotation.of(run.is_long), run.n_past + np.arange(run.n_tokens))
        assert error(result[at : at + run.n_tokens], expected.reshape(run.n_tokens, 32)) < 1e-6
        at += run.n_tokens


@pytest.mark.parametrize("window", [0, 9])
def test_attention(window: int) -> None:
    """A batch, a single token and, with a window, batches over the end of a page."""
    shape = AttentionShape(4, 2, 10, 0.3, window, softcap=float(window))
    qkv = np.random.default_rng(9).standard_normal((12, 80))

    def record(step: Step) -> Step:
        a, out = step.input(qkv), step.buffer(40)
        cache = step.backend.cache(shape, mixed_table(100), CacheType())
        sinks = None if window else step.vector(np.array([0.5, 3, -2, 1]))
        step.add(Attend(a.columns(0, 40), a.columns(40, 20), a.columns(60, 20), cache, shape, out, sinks))
        return step.finish(out)

    both(record, [(0, 12), (12, 1), *([(13, 12), (25, 12), (37, 12), (49, 12), (61, 12)] if window else [])], HALF)


@pytest.mark.parametrize(("n_head", "n_nope", "n_rot", "n_latent"), [(4, 24, 8, 32), (18, 8, 32, 512)])
def test_latent_attention(n_head: int, n_nope: int, n_rot: int, n_latent: int) -> None:
    """Keys of a latent row and a rotated end; values that are the latent rows; a matrix for each head on both sides."""
    rng, head_dim, n_value = np.random.default_rng(3), n_latent + n_rot, 20
    q, k = rng.standard_normal((20, n_head * (n_nope + n_rot))), rng.standard_normal((20, head_dim))
    shape = AttentionShape(n_head, 1, head_dim, 0.2, n_latent=n_latent)
    rotation = Rotation("norm", n_rot, 1e4 ** -(np.arange(n_rot // 2) / n_rot * 2))
    matrices = [
        replace(random_tensor("F32", n_head * n_out, n_in, n_in), ne=(n_in, n_out, n_head))
        for n_in, n_out in ((n_nope, n_latent), (n_latent, n_value))
    ]

    def record(step: Step) -> Step:
        queries, keys = step.input(q), step.input(k)
        absorbed, attn, out = (step.buffer(n_head * n) for n in (head_dim, n_latent, n_value))
        step.add(Rope(queries.columns(n_nope, queries.width - n_nope), rotation, n_nope + n_rot))
        step.add(Rope(keys.columns(n_latent, n_rot), rotation, n_rot))
        step.add(MatmulHeads(queries, step.backend.weight(matrices[:1]), absorbed, n_head))
        cache = step.backend.cache(shape, mixed_table(100), CacheType())
        step.add(Attend(absorbed, keys, keys.columns(0, n_latent), cache, shape, attn))
        step.add(MatmulHeads(attn, step.backend.weight(matrices[1:]), out, n_head))
        return step.finish(out)

    more = [(28, 12), (40, 12), (52, 12), (64, 12), (76, 1)] if n_latent == 32 else []  # over the end of a page
    both(record, [(0, 12), (12, 12), (24, 1), (25, 3), *more], HALF)


def greatest(row: np.ndarray, top: Top) -> np.ndarray:
    """The columns of the greatest values of a row, those that the mask allows first, unless they are no numbers."""
    rank = np.where(np.isnan(row), np.inf, row.astype(np.float64))
    if top.mask is not None:
        is_free = np.unpackbits(top.mask.view(np.uint8), count=len(row), bitorder="little") == 1
        is_free |= rank == np.inf
        order = np.lexsort((-rank, ~is_free))
        return order[: top.n]
    return np.argsort(-rank, kind="stable")[: top.n]


@pytest.mark.parametrize("n_column", [5, 1500, 16 * 1024 + 5])
def test_the_greatest_results(n_column: int) -> None:
    """Equal ones, zeros of both signs, numbers that are none, masks; all values of some rows; fewer columns than are
    asked for. The greatest of thousands of columns are found in three steps."""
    rng, n = np.random.default_rng(2), 4 if n_column < 9999 else 1
    x = rng.standard_normal((n, n_column)).astype(np.float32)
    x[0, ::3] = 1.5
    if n > 1:
        x[1, 2:], x[1, :2], x[2], x[3, [1, 4]] = -np.inf, (0, -0.0), -np.inf, (np.nan, np.inf)
    step = Step(gpu(), n)
    step.finish(step.input(x))
    masks = [None, *(np.packbits(rng.random(-(-n_column // 32) * 32) < part).view("<u4") for part in (0.0, 0.1, 0.9))]
    for sizes in ((1,), (64,)) if n == 1 else ((1, 1, 1, 1), (64, 1, 0, 40), (0, 2, 64, 64)):
        tops = [Top(k, masks[rng.integers(4)]) if k else None for k in sizes]
        found = step.program.run(np.arange(n, dtype=np.int32), [Run(0, 0, n)], range(n), tops=tops)
        assert np.array_equal(found.values, x[[i for i, top in enumerate(tops) if top is None]], equal_nan=True)
        asked = [(row, top) for row, top in zip(x, tops, strict=True) if top is not None]
        for (row, top), values, columns in zip(asked, found.greatest, found.columns, strict=True):
            expected = greatest(row, top)
            assert np.array_equal(columns[: top.n][: len(expected)], expected)
            assert np.array_equal(values[: len(expected)], row[expected], equal_nan=True)
            assert (columns[n_column:] == -1).all()
            assert (values[n_column:] == -np.inf).all()


def test_observe() -> None:
    x = np.random.default_rng(4).standard_normal((12, 33)).astype(np.float32)
    step = Step(gpu(), 12)
    a = step.input(x)
    squares = step.backend.squares(33)
    step.add(Observe(a, squares))
    step.finish(a)
    for n in (5, 12):
        step.run(n)
    expected = (x[:5].astype(np.float64) ** 2).sum(0) + (x.astype(np.float64) ** 2).sum(0)
    sums, counts = squares.take()
    assert error(sums, expected[None]) < 1e-12
    assert counts.tolist() == [17]
    assert not any(part.any() for part in squares.take())
    with pytest.raises(UnsupportedError, match="--full needs all layers on the CPU: give --gpu-layers 0"):
        squares.keep(5)


@pytest.mark.parametrize("n_group", [1, 3])
def test_layer_norm_and_small_ops(n_group: int) -> None:
    rng = np.random.default_rng(11)
    x, gate, weight = rng.standard_normal((3, 12, 84))
    cap = 3.0 * (n_group - 1)

    def record(step: Step) -> Step:
        a, b = step.input(x), step.input(gate[:, :1])
        bias = step.vector(weight[1]) if n_group == 1 else None
        step.add(LayerNorm(a, step.vector(weight[0]), bias, a, 0.01, n_group))
        step.add(GateRows(a, b))
        step.add(Softcap(a, 1.7, cap))
        step.add(Gated(a, None, a, "gelu"))
        step.add(Temper(a, Temperature(0.3, 4, n_group)))
        return step.finish(a)

    both(record, [(0, 12)])


def test_streams() -> None:
    both(lambda step: streams(step, 84), [(0, 5)])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_functions(activation: str) -> None:
    """xielu too, of numbers next to 0, where e^x - 1 has few bits."""
    x, up = np.random.default_rng(12).standard_normal((2, 5, 84))
    x *= 10.0 ** np.arange(-4, 1)[:, None]

    def record(step: Step) -> Step:
        a = step.input(x)
        step.add(Xielu(a, a, 0.7, 1.3, 0.5, -1e-6))
        step.add(Gated(a, step.input(up), a, activation))
        return step.finish(a)

    both(record, [(0, 5)])


def test_each_sequence_has_its_scales_of_adapters() -> None:
    expected, actual = compare(Step(NumpyBackend(np.float64), 8), Step(gpu(), 8))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
