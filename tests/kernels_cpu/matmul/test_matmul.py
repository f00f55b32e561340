"""matmul of the CPU backend: every tensor type, awkward shapes, against the float64 product of the same numbers."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from cpu_ops import QUANTIZED, MemoryTensor, Step, as_quantized, cpu, error, random_tensor, tensor_of, weights_of

from gguf_run.formats.blocks.coded import CODED_FORMS
from gguf_run.formats.blocks.types import type_by_name
from gguf_run.kernels_cpu.backend import CpuBackend
from gguf_run.kernels_cpu.vector.isa import Tuning, current
from gguf_run.models.ops import Matmul

FLOATS = ("F32", "F16", "BF16", "F64", "I8", "I16")
TOKENS = (1, 2, 3, 4, 5, 8, 9, 15, 17, 64)
N_BATCH = 66
GUARD = np.float32(-777.25)
BOUND = 1e-5  # float32 sums of some hundred products


@dataclass(frozen=True)
class Shape:
    """blocks: n_in in blocks of the type (of 33 columns for types without blocks)."""

    n_out: int
    blocks: int
    n_threads: int = 2
    bias: bool = False
    residual: bool = False
    in_place: bool = False  # out is residual


SHAPES = (
    Shape(1, 1, 1),
    Shape(16, 1, 2, bias=True),
    Shape(17, 3, 3, residual=True, bias=True, in_place=True),
    Shape(31, 2, 1, residual=True),
    Shape(80, 2, 2, residual=True, in_place=True),
    Shape(167, 1, 3, residual=True, bias=True),
)
ODD_COLUMNS = (1, 2, 7, 33, 172)


def rows_of_tiles(n: int) -> int:
    """The rows that the tiles of n tokens write: full tiles, and the smallest one that holds the rest."""
    most = current().tokens
    return n // most * most + next(size for size in (0, 1, 2, 4, 8) if size >= n % most and (size != 1 or n == 1))


def check_matmul(
    backend: CpuBackend,
    tensors: Sequence[MemoryTensor],
    shape: Shape,
    tokens: Sequence[int] = TOKENS,
    n_batch: int = N_BATCH,
) -> None:
    """One program, run for several numbers of tokens; out stands between columns that must not change."""
    rng = np.random.default_rng(7)
    w = weights_of(tensors)
    n_out, n_in = w.shape
    x = (rng.standard_normal((n_batch, n_in)) * np.exp(rng.standard_normal((n_batch, 1)))).astype(np.float32)
    residual, bias = rng.standard_normal((n_batch, n_out)), rng.standard_normal(n_out)
    residual, bias = residual.astype(np.float32) * np.float32(0.1), bias.astype(np.float32)
    is_quantized = np.concatenate([np.full(t.n_rows, t.type.name in QUANTIZED) for t in tensors])
    expected = np.where(is_quantized, as_quantized(x) @ w.T if is_quantized.any() else 0, x.astype(np.float64) @ w.T)

    step = Step(backend, n_batch)
    weight = backend.weight(tensors)
    assert (weight.n_in, weight.n_out) == (n_in, n_out)
    wide = step.input(np.full((n_batch, n_out + 37), GUARD))
    out = wide.columns(16, n_out)
    options = {}
    if shape.residual:
        options["residual"] = step.input(residual, out if shape.in_place else None)
        expected = expected + residual
    if shape.bias:
        options["bias"] = step.vector(bias)
        expected = expected + bias
    step.add(Matmul(step.input(x), weight, out, **options))
    memory = step.finish(wide).program.to_host(wide, 2 * n_batch)  # and the rows that only fill up a tile
    for n in tokens:
        memory[:] = GUARD
        result = step.run(n)
        assert error(result[:, 16 : 16 + n_out], expected[:n]) < BOUND, (n, shape)
        assert (result[:, :16] == GUARD).all()
        assert (result[:, 16 + n_out :] == GUARD).all()
        assert (memory[rows_of_tiles(n) :] == GUARD).all(), "a row of no tile was written"


def check_type(type_name: str, shapes: Sequence[Shape] = SHAPES) -> None:
    block = max(33, type_by_name(type_name).block_size) if type_name in FLOATS else type_by_name(type_name).block_size
    for i, shape in enumerate(shapes):
        tensor = random_tensor(type_name, shape.n_out, shape.blocks * block, seed=i)
        check_matmul(cpu(shape.n_threads), [tensor], shape)


@pytest.mark.parametrize("type_name", dict.fromkeys([*QUANTIZED, *FLOATS, *CODED_FORMS]))
def test_every_type(type_name: str) -> None:
    check_type(type_name)


@pytest.mark.parametrize(("type_name", "byte"), [("Q2_K", 255), ("Q3_K", 255), ("Q3_K", 0)])
def test_largest_sums(type_name: str, byte: int) -> None:
    """Sums of half a block are added in 16 bits: all integers at an end of their range, activations of one sign."""
    blocks = np.full((16, type_by_name(type_name).type_size), byte, np.uint8)
    blocks[:, -4:] = np.frombuffer(np.float16([0.5, 0.25]).tobytes(), np.uint8)
    backend, tensor = cpu(2), tensor_of(blocks, type_name)
    x = np.outer([1, -1], np.ones(256)).astype(np.float32)
    step = Step(backend, 2)
    out = step.input(np.zeros((2, 16)))
    step.add(Matmul(step.input(x), backend.weight([tensor]), out))
    expected = as_quantized(x) @ weights_of([tensor]).T
    step.finish(out)
    for n in (1, 2):
        assert error(step.run(n), expected[:n]) < BOUND


@pytest.mark.parametrize("n_in", ODD_COLUMNS)
@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16"])
def test_odd_columns(type_name: str, n_in: int) -> None:
    for n_out, residual in itertools.product((1, 15, 33), (False, True)):
        shape = Shape(n_out, 1, residual=residual)
        check_matmul(cpu(2), [random_tensor(type_name, n_out, n_in)], shape, (1, 2, 4, 7))


@pytest.mark.parametrize("n_threads", [1, 2, 3, 5])
@pytest.mark.parametrize("type_name", ["Q4_0", "F16"])
def test_work_of_many_pieces(type_name: str, n_threads: int) -> None:
    """More panels and tiles than a piece takes, in a batch and for one token."""
    shape = Shape(16 * 45 + 9, 1, bias=True, residual=True)
    tensor = random_tensor(type_name, shape.n_out, 256)
    check_matmul(cpu(n_threads), [tensor], shape, (1, 4, 150), n_batch=151)


STACKS: dict[str, list[tuple[str, int]]] = {
    "one type, whole panels": [("Q4_0", 32), ("Q4_0", 16), ("Q4_0", 48)],
    "one type, broken panels": [("Q4_0", 17), ("Q4_0", 5), ("Q4_0", 16), ("Q4_0", 3)],
    "types of one panel": [("IQ4_NL", 16), ("Q8_0", 24), ("IQ4_NL", 7)],
    "types of several panels": [("Q4_K", 32), ("Q4_K", 16), ("Q6_K", 16), ("F32", 20), ("Q8_0", 3)],
    "integers between floats": [("F32", 7), ("Q8_0", 11), ("F32", 2), ("F16", 16)],
    "coded types": [("NF4", 16), ("FP8_E4M3", 32), ("FP8_E4M3", 5), ("Q8_0", 16), ("INT8", 16)],
    "through F32": [("I8", 9), ("F64", 5), ("I8", 16)],
}


@pytest.mark.parametrize("name", STACKS)
def test_stacked_tensors(name: str) -> None:
    tensors = [random_tensor(type_name, n_out, 256, seed=i) for i, (type_name, n_out) in enumerate(STACKS[name])]
    for extra in (Shape(0, 0), Shape(0, 0, bias=True), Shape(0, 0, bias=True, residual=True, in_place=True)):
        check_matmul(cpu(3), tensors, extra, (1, 2, 5))


def test_one_input_for_weights_of_both_kinds() -> None:
    """x is read as floats and as int8 by turns; out of columns of a wider buffer too."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((9, 160)).astype(np.float32)
    step = Step(cpu(2), 9)
    x = step.input(values).columns(48, 64)
    tensors = [random_tensor(name, 24, 64) for name in ("Q8_0", "F32", "Q4_1")]
    out = step.buffer(72)
    for i, tensor in enumerate(tensors):
        step.add(Matmul(x, step.backend.weight([tensor]), out.columns(24 * i, 24)))
    part = values[:, 48:112]
    expected = [(part if t.type.name == "F32" else as_quantized(part)) @ weights_of([t]).T for t in tensors]
    assert error(step.finish(out).run(9), np.concatenate(expected, axis=1)) < BOUND


def test_threads_do_not_change_a_bit() -> None:
    """A lane of a tile is one row of one token: which thread computes it is all that differs."""
    results = []
    x = np.random.default_rng(1).standard_normal((40, 512)).astype(np.float32)
    for n_threads in (1, 2, 3):
        step = Step(cpu(n_threads), 40)
        out = step.buffer(333)
        step.add(Matmul(step.input(x), step.backend.weight([random_tensor("Q4_K", 333, 512)]), out))
        step.finish(out)
        results.append([step.run(n) for n in (1, 40)])
    for one, *others in zip(*results, strict=True):
        assert all((one == other).all() for other in others)


TUNINGS = (Tuning(), Tuning(ahead=-1, tile_tokens=8), Tuning(ahead=0, piece_bytes=4096), Tuning(ahead=16384))


@pytest.mark.parametrize("type_name", ["Q4_0", "Q3_K", "Q4_K", "Q6_K", "Q8_0", "MXFP4", "F16", "F32"])
def test_a_token_has_the_same_bits_in_every_tile(type_name: str) -> None:
    """However many tokens a step has, whichever tiles a batch is cut into, whatever is measured on a machine."""
    n_batch, n_out = 35, 173
    x = np.random.default_rng(1).standard_normal((n_batch, 512)).astype(np.float32)
    step = Step(cpu(2), n_batch)
    out = step.buffer(n_out)
    step.add(Matmul(step.input(x), step.backend.weight([random_tensor(type_name, n_out, 512)]), out))
    step.finish(out)
    whole = step.run(n_batch)
    alone = [step.run(1, first_id=i) for i in range(n_batch)]
    # A single token adds floats in more sums, which run side by side.
    assert (np.concatenate(alone) == whole).all() or type_name not in QUANTIZED
    for tuning in TUNINGS:
        step.program._tape.tune(tuning)
        assert (step.run(1, first_id=3) == alone[3]).all()
        for n in (*range(2, 20), 24, 31, 33, n_batch):
            assert (step.run(n, first_id=n_batch - n) == whole[n_batch - n :]).all(), (n, tuning)


def test_threads_do_not_share_spare_memory() -> None:
    """Every tile of a matrix of 5 rows goes through spare memory; thousands of them, two threads or more."""
    check_matmul(cpu(3), [random_tensor("F16", 5, 8)], Shape(5, 1, residual=True), [1024] * 50, n_batch=1024)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("type_name", ["F32", "Q4_0"])
def test_what_is_not_finite_stays_in_its_row(type_name: str, value: float) -> None:
    x = np.ones((6, 64), np.float32)
    x[2, 40] = value
    step = Step(cpu(2), 6)
    out = step.buffer(20)
    tensor = random_tensor(type_name, 20, 64)
    step.add(Matmul(step.input(x), step.backend.weight([tensor]), out))
    result = step.finish(out).run(6)
    assert error(np.delete(result, 2, 0), np.delete(np.ones((6, 64)) @ weights_of([tensor]).T, 2, 0)) < BOUND
