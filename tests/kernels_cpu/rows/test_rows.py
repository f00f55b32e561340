"""The CPU backend's ops on rows: embed, outputs, rms_norm, rope, gated, and the int8 activations that they leave."""

import itertools
import math

import numpy as np
import pytest
from cpu_ops import (
    QUANTIZED,
    Step,
    as_quantized,
    cpu,
    error,
    new_cache,
    quantize_twin,
    random_tensor,
    read_q8,
    weights_of,
)
from numpy_backend import ACTIVATIONS, rotate, xielu

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import CHECKPOINT_TYPES, TENSOR_TYPES, type_by_name
from gguf_run.kernels_cpu.panels.panels import x_stride
from gguf_run.models.backend import Run
from gguf_run.models.operands import AttentionShape, Buffer, Rotation
from gguf_run.models.ops import Attend, Embed, Gated, Matmul, RmsNorm, Rope
from gguf_run.models.rare_ops import Xielu

TOKENS = (1, 2, 5, 19)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# int8 activations
def written_q8(step: Step, x: Buffer, n_tokens: int) -> dict[str, np.ndarray]:
    """The fields of x's activation blocks, [n_tokens, n / 32, ...], after a run."""
    blocks = step.program._tape._int8[x].reshape(-1, x_stride(x.width))[:n_tokens, : 2 * x.width]
    return read_q8(blocks)


def check_q8(fields: dict[str, np.ndarray], x: np.ndarray) -> None:
    """The blocks are those of x, float32[n_tokens, n], bit for bit."""
    d, q = quantize_twin(x)
    np.testing.assert_array_equal(fields["d"][..., 0], d)
    np.testing.assert_array_equal(fields["q"], q)
    sums = [q.astype(np.int32)[..., part].sum(-1) for part in (slice(None), slice(0, 16), slice(16, 32))]
    np.testing.assert_array_equal(fields["sums"], -32 * np.stack(sums, -1))
    np.testing.assert_array_equal(fields["d_sums"], np.stack(sums, -1).astype(np.float32) * d[..., None])


def matmul_with(step: Step, x: Buffer, type_name: str = "Q8_0") -> Buffer:
    """Add a matmul that reads x as int8."""
    out = step.buffer(16)
    step.add(Matmul(x, step.backend.weight([random_tensor(type_name, 16, x.width)]), out))
    return out


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize(("start", "width"), [(0, 32), (0, 96), (5, 64), (16, 1056)])
def test_activations_are_quantized(start: int, width: int, n_threads: int) -> None:
    values = normal(19, start + width + 3) * np.exp(3 * normal(19, 1, seed=1))
    values[3] = 0
    values[4, start : start + 32] = 0
    values[5, start + 7] = 1e6  # all others become 0
    values[6, start : start + 32] = -0.0
    step = Step(cpu(n_threads), 19)
    x = step.input(values).columns(start, width)
    step.finish(matmul_with(step, x))
    for n in TOKENS:
        step.run(n)
        check_q8(written_q8(step, x, n), values[:n, start : start + width])


@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1e20, 1e35])
def test_activations_of_any_size_are_quantized(scale: float) -> None:
    values = normal(4, 64) * np.float32(scale)
    step = Step(cpu(2), 4)
    x = step.input(values)
    result = step.finish(matmul_with(step, x)).run(4)
    check_q8(written_q8(step, x, 4), values)
    assert error(result / scale, as_quantized(values) / scale @ weights_of([random_tensor("Q8_0", 16, 64)]).T) < 1e-5


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e-38, 1e-45])
def test_what_cannot_be_quantized_does_no_harm(value: float) -> None:
    """Neither a crash nor a wrong neighbour; too small for int8 means nearly 0."""
    values = normal(3, 96)
    values[1, 32:64] = 0
    values[1, 40] = value
    step = Step(cpu(2), 3)
    x = step.input(values)
    result = step.finish(matmul_with(step, x)).run(3)
    fields = written_q8(step, x, 3)
    values[1, 32:64], expected = 0, None
    for name, field in fields.items():
        field[1, 1] = 0
        assert np.isfinite(field).all(), name
    check_q8(fields, values)
    if abs(value) < 1:
        expected = as_quantized(values) @ weights_of([random_tensor("Q8_0", 16, 96)]).T
        assert error(result, expected) < 1e-5


PRODUCERS = ("rms_norm", "rms_norm in place", "gated", "gated in place", "attention", "matmul", "rope", "qk norm")


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("producer", PRODUCERS)
def test_the_op_that_makes_a_row_quantizes_it(producer: str, n_threads: int) -> None:
    """Whoever does it, the blocks are those of the row as it is when the matmul comes."""
    n = 544  # one piece of gated and a bit
    step = Step(cpu(n_threads), 19)
    x, out = step.input(normal(19, n)), step.buffer(n)
    other = step.input(normal(19, n, seed=1))
    if producer.startswith("rms_norm"):
        out = x if "place" in producer else out
        step.add(RmsNorm(x, step.vector(normal(n)), out, 1e-5))
    elif producer.startswith("gated"):
        out = x if "place" in producer else out
        step.add(Gated(x, other, out, "silu"))
    elif producer == "attention":
        shape = AttentionShape(17, 17, 32, 0.2)
        step.add(Attend(x, other, other, new_cache(step.backend, shape, 32, 32), shape, out))
    elif producer == "matmul":
        step.add(Matmul(x, step.backend.weight([random_tensor("F32", n, n)]), out))
    else:
        out = x
        matmul_with(step, x)  # the blocks of what x was before
        if producer == "rope":
            step.add(Rope(x, Rotation("neox", 32, np.ones(16)), 32))
        else:
            step.add(RmsNorm(x, step.vector(normal(32)), x, 1e-5, n_group=17))
    step.finish(matmul_with(step, out))
    for n_tokens in TOKENS:
        step.run(n_tokens)
        check_q8(written_q8(step, out, n_tokens), step.program.to_host(out, n_tokens))


def test_blocks_are_made_anew_when_a_part_of_a_row_changes() -> None:
    values, weight = normal(3, 128), [random_tensor("Q8_0", 16, 64)]
    step = Step(cpu(2), 3)
    x, both = step.input(values), step.buffer(32)
    half = x.columns(64, 64)
    for i in range(2):
        step.add(Matmul(half, step.backend.weight(weight), both.columns(16 * i, 16)))
        step.add(RmsNorm(x.columns(64, 32), step.vector(np.full(32, 2.0)), x.columns(64, 32), 1e-5))
    result = step.finish(both).run(3)
    part = values[:, 64:].astype(np.float64)
    changed = part.copy()
    changed[:, :32] *= 2 / np.sqrt((part[:, :32] ** 2).mean(1, keepdims=True) + 1e-5)
    expected = [as_quantized(rows) @ weights_of(weight).T for rows in (part, changed)]
    assert error(result, np.concatenate(expected, 1)) < 2e-3  # a value may fall on the other side of a half
    assert error(result[:, :16], expected[0]) < 1e-5


# embed, outputs
@pytest.mark.parametrize("type_name", [type.name for type in (*TENSOR_TYPES, *CHECKPOINT_TYPES)])
def test_embed(type_name: str) -> None:
    """Rows in any order and repeated, exactly as dequantize gives them."""
    block = type_by_name(type_name).block_size
    tensor = random_tensor(type_name, 23, 2 * block if block > 1 else 37)
    rows = dequantize(tensor.blocks(), tensor.type)
    ids = np.array([22, 0, 5, 5, 21, 3, 0], np.int32)
    for scale, n_threads in ((1.0, 1), (math.sqrt(640), 3)):
        step = Step(cpu(n_threads), 8)
        out = step.buffer(rows.shape[1] + 5)
        step.add(Embed(cpu(n_threads).table(tensor), out.columns(3, rows.shape[1]), scale))
        result = step.finish(out).program.run(ids, [Run(0, 0, len(ids))], range(len(ids))).values
        np.testing.assert_array_equal(result[:, 3:-2], (rows[ids].astype(np.float64) * scale).astype(np.float32))
        assert (result[:, :3] == 0).all()
        assert (result[:, -2:] == 0).all()


def test_outputs_copies_the_wanted_rows() -> None:
    values = normal(40, 21)
    step = Step(cpu(2), 40)
    x = step.buffer(21)
    step.add(Embed(cpu(2).table(random_tensor("F32", 40, 21)), x))
    values = weights_of([random_tensor("F32", 40, 21)])
    out = step.outputs(x)
    double = step.buffer(21)
    step.add(Matmul(out, cpu(2).weight([random_tensor("F32", 21, 21)]), double))
    program = cpu(2).program(step.parts, step.after, double, 40, 7)
    assert (program.n_batch, program.n_outputs) == (40, 7)
    expected = values @ weights_of([random_tensor("F32", 21, 21)]).T
    assert program.run(np.arange(40, dtype=np.int32), [Run(0, 0, 40)], ()).values.shape == (0, 21)
    for first, count in ((0, 7), (33, 7), (39, 1), (5, 2), (0, 0)):
        assert np.abs(program.more(range(first, first + count)) - expected[first : first + count]).max(initial=0) < 1e-5
    rows = program.run(np.arange(3, 9, dtype=np.int32), [Run(0, 0, 6)], [4, 5]).values
    assert np.abs(rows - expected[7:9]).max() < 1e-5


# rms_norm
def norm_twin(x: np.ndarray, weight: np.ndarray, eps: float, n_group: int) -> np.ndarray:
    part = x.astype(np.float64).reshape(len(x), n_group, -1)
    parts = part / np.sqrt((part**2).mean(-1, keepdims=True) + eps)
    return (parts * weight.reshape(-1, part.shape[-1])).reshape(x.shape)


@pytest.mark.parametrize("where", ["new", "x", "residual"])
@pytest.mark.parametrize(("n", "n_group"), [(1, 1), (7, 1), (33, 1), (576, 1), (4096, 1), (8, 3), (20, 5), (64, 9)])
def test_rms_norm(n: int, n_group: int, where: str) -> None:
    eps, width = 1e-5, n * n_group
    values = normal(19, width) * np.exp(4 * normal(19, 1, seed=1))  # rows of very different size
    values[2] = 0
    for n_threads, with_residual in itertools.product((1, 3), (where == "residual", True)):
        is_grouped = n_threads == 3
        weight = 1 + 0.3 * normal(width if is_grouped else n, seed=2)
        step = Step(cpu(n_threads), 19)
        x, residual = step.input(values), normal(19, width, seed=3)
        rest = step.input(residual) if with_residual else None
        out = {"new": step.buffer(width + 9).columns(5, width), "x": x, "residual": rest}[where]
        step.add(RmsNorm(x, step.vector(weight), out, eps, n_group, rest, is_grouped))
        step.finish(out)
        expected = norm_twin(values, weight, eps, n_group) + (residual if with_residual else 0)
        for n_tokens in TOKENS:
            assert np.abs(step.run(n_tokens) - expected[:n_tokens]).max() < 2e-6 * np.abs(expected).max()


def test_rms_norm_of_tiny_rows_is_ruled_by_eps() -> None:
    values = normal(3, 64) * np.float32(1e-4)
    for eps in (1e-6, 1e-12):
        step = Step(cpu(2), 3)
        out = step.buffer(64)
        step.add(RmsNorm(step.input(values), step.vector(np.ones(64)), out, eps))
        assert error(step.finish(out).run(3), norm_twin(values, np.ones(64), eps, 1)) < 1e-6


# rope
@pytest.mark.parametrize("style", ["norm", "neox"])
@pytest.mark.parametrize(
    ("n_head", "head_dim", "n_rot"), [(1, 2, 2), (3, 8, 8), (5, 20, 12), (40, 64, 64), (2, 80, 26)]
)
def test_rope(n_head: int, head_dim: int, n_rot: int, style: str) -> None:
    width = n_head * head_dim
    values = normal(19, width + 3)
    rope = Rotation(style, n_rot, 1e4 ** -(np.arange(n_rot // 2) / (n_rot // 2)), 0.8)
    for n_threads in (1, 3):
        step = Step(cpu(n_threads), 19)
        x = step.input(values)
        step.add(Rope(x.columns(3, width), rope, head_dim))
        step.finish(x)
        for n_tokens, n_past in itertools.product(TOKENS, (0, 1, 4093, 100_000, 1_000_000)):
            result = step.run(n_tokens, n_past)
            heads = values[:n_tokens, 3:].astype(np.float64).reshape(n_tokens, n_head, head_dim)
            expected = rotate(heads, rope, n_past + np.arange(n_tokens)).reshape(n_tokens, width)
            assert error(result[:, 3:], expected) < 2e-7
            np.testing.assert_array_equal(result[:, :3], values[:n_tokens, :3])
            if n_rot < head_dim:
                same = result[:, 3:].reshape(heads.shape)[..., n_rot:]
                np.testing.assert_array_equal(same, heads[..., n_rot:])


def test_long_sequences_turn_by_other_frequencies() -> None:
    """Runs of both kinds in one step."""
    x = np.random.default_rng(4).standard_normal((9, 32))
    rotation = Rotation("neox", 16, 1e4 ** -(np.arange(8) / 8), 1.3, 3e3 ** -(np.arange(8) / 8), 64)
    step = Step(cpu(1), 9)
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


def test_ropes_of_one_program_do_not_mix() -> None:
    """gemma3 turns by two bases; each by its own table, whichever comes first and as often as it likes."""
    ropes = [Rotation("neox", 16, base ** -(np.arange(8) / 8)) for base in (1e4, 1e6)]
    values = normal(5, 16)
    step = Step(cpu(2), 5)
    x = step.input(values)
    for i in (0, 1, 0, 1, 1):
        step.add(Rope(x, ropes[i], 16))
    expected = values.astype(np.float64)[:, None]
    for i in (0, 1, 0, 1, 1):
        expected = rotate(expected, ropes[i], 7 + np.arange(5))
    assert error(step.finish(x).run(5, 7), expected[:, 0]) < 1e-6


# gated
@pytest.mark.parametrize("where", ["new", "gate", "up"])
@pytest.mark.parametrize("width", [1, 8, 16, 20, 33, 511, 512, 513, 1100])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated(activation: str, width: int, where: str) -> None:
    gates, ups = 4 * normal(19, width), normal(19, width, seed=1)
    expected = ACTIVATIONS[activation](gates.astype(np.float64)) * ups
    for n_threads in (1, 3):
        step = Step(cpu(n_threads), 19)
        wide = step.buffer(2 * width)
        gate, up = step.input(gates, wide.columns(0, width)), step.input(ups, wide.columns(width, width))
        out = {"new": step.buffer(width), "gate": gate, "up": up}[where]
        step.add(Gated(gate, up, out, activation))
        step.finish(out)
        for n in TOKENS:
            # far below 0 the result is tiny and so is what its error means
            assert (np.abs(step.run(n) - expected[:n]) <= 1e-6 * np.abs(expected[:n]) + 2e-7 * np.abs(ups[:n])).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_at_extremes(activation: str) -> None:
    """In the vector part (16 columns) and in the rest."""
    numbers = [0.0, -0.0, 1e-30, -1e-30, 100, -100, 1e4, -1e4, 1e15, -1e15, 88, -88, 87.4, -87.4, 20, -20, 12, -12]
    gates = np.array([numbers * 2, (numbers * 2)[::-1]], np.float32)
    assert gates.shape[1] % 16 != 0
    step = Step(cpu(2), 2)
    out = step.buffer(gates.shape[1])
    step.add(Gated(step.input(gates), step.input(np.full(gates.shape, 0.5)), out, activation))
    result = step.finish(out).run(2)
    with np.errstate(over="ignore"):
        expected = ACTIVATIONS[activation](gates.astype(np.float64)) * 0.5
    assert np.isfinite(result).all()
    assert (np.abs(result - expected) <= 1e-6 * np.abs(expected) + 1e-7).all(), result - expected


@pytest.mark.parametrize("width", [48, 1100])
def test_xielu(width: int) -> None:
    """Relative to each number and its x: next to 0, e^x - 1 has few bits unless it is summed."""
    spread = normal(5, width) * 10.0 ** np.random.default_rng(3).integers(-7, 2, (5, width))
    spread[:, :8] = [0, -0.0, -1e-6, -5e-7, -0.5, -0.49999, -90, 1e4]
    step = Step(cpu(3), 5)
    spread = spread.astype(np.float32).astype(np.float64)
    x, out = step.input(spread), step.buffer(width)
    op = Xielu(x, out, 0.7, 1.3, 0.5, -1e-6)
    step.add(op)
    expected = xielu(spread, op)
    assert (np.abs(step.finish(out).run(5) - expected) <= 5e-7 * (np.abs(expected) + np.abs(spread))).all()


@pytest.mark.parametrize("type_name", QUANTIZED[:3])
def test_gated_leaves_int8_for_the_next_matmul(type_name: str) -> None:
    """ffn_down reads columns of a wider buffer, in place of the gate."""
    gates, ups = normal(6, 1120), normal(6, 1120, seed=1)
    step = Step(cpu(3), 6)
    wide = step.buffer(2 * 1120)
    gate, up = step.input(gates, wide.columns(0, 1120)), step.input(ups, wide.columns(1120, 1120))
    step.add(Gated(gate, up, gate, "silu"))
    step.finish(matmul_with(step, gate, type_name))
    step.run(6)
    check_q8(written_q8(step, gate, 6), step.program.to_host(gate, 6))
