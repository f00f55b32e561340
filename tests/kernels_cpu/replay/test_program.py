"""Programs as a whole: ops in random order on shared buffers, output rows, repetition, memory kept alive.

A pass over the list decides which op makes the int8 form of a row (kernels_cpu/int8_forms.py). A mistake there shows
only when ops follow each other in an unusual way.
"""

import gc
from typing import Any

import numpy as np
import pytest
from cpu_ops import Q8Backend, Step, cpu, error, kernel_names, new_cache, random_tensor, tensor_of
from numpy_backend import rotate
from tinymodel import quantize

from gguf_run.kernels_cpu.backend import CpuBackend
from gguf_run.kernels_cpu.panels.memory import Arena
from gguf_run.models.backend import Run
from gguf_run.models.operands import AttentionShape, Rotation
from gguf_run.models.ops import Attend, Gated, Matmul, RmsNorm, Rope

N_BATCH, N_CTX, WIDTH = 12, 64, 128
VIEWS = ((0, 128), (0, 64), (64, 64), (32, 64), (0, 32), (96, 32))
HEADS, HEADS_2 = AttentionShape(2, 1, 32, 0.2, 9), AttentionShape(2, 2, 32, 0.2)
ROPE = Rotation("neox", 32, 1e4 ** -(np.arange(16) / 16))


class RandomProgram:
    """The same random ops for any backend. After `outputs`, ops are on the buffers of the wanted rows."""

    def __init__(self, seed: int, backend: Any, n_ops: int = 25) -> None:
        self.rng = np.random.default_rng(seed)
        self.step = Step(backend, N_BATCH)
        self.backend = backend
        inputs = np.random.default_rng(0).standard_normal((3, N_CTX, WIDTH)).astype(np.float32)
        self.buffers = [self.step.input(values) for values in inputs]
        for _ in range(n_ops):
            self.any_op()
        self.buffers = [self.step.outputs(self.buffers[0])]
        for _ in range(2):
            out = self.step.buffer(WIDTH)
            self.matmul(self.buffers[0], out, WIDTH, WIDTH)
            self.buffers.append(out)
        for _ in range(8):
            self.any_op(after=True)
        result = self.step.buffer(3 * WIDTH)
        for i, buffer in enumerate(self.buffers):  # sizes alike, so that no part hides behind another
            self.step.add(RmsNorm(buffer, self.ones(WIDTH), result.columns(i * WIDTH, WIDTH), 1e-6))
        self.program = self.step.finish(result).program

    def ones(self, n: int) -> Any:
        return self.step.vector(np.ones(n))

    def some(self, *, width: int | None = None, not_in: int | None = None) -> tuple[int, Any]:
        """A buffer's number and columns of it."""
        number = int(self.rng.choice([i for i in range(3) if i != not_in]))
        start, n = VIEWS[self.rng.choice([i for i, (_, n) in enumerate(VIEWS) if width in (None, n)])]
        return number, self.buffers[number].columns(start, n)

    def matmul(self, x: Any, out: Any, n_in: int, n_out: int, residual: Any = None) -> None:
        values = self.rng.standard_normal((n_out, n_in)).astype(np.float32) / np.float32(n_in**0.5)
        type_name = str(self.rng.choice(["Q8_0", "Q4_1", "F32"]))
        tensor = tensor_of(np.ascontiguousarray(quantize(values, type_name)).view(np.uint8), type_name)
        self.step.add(Matmul(x, self.backend.weight([tensor]), out, residual=residual))

    def any_op(self, after: bool = False) -> None:
        step, (number, x) = self.step, self.some()
        name = self.rng.choice(["matmul", "matmul", "rms_norm", "gated", *([] if after else ["rope", "attention"])])
        in_place, choice = self.rng.random() < 0.5, self.rng.random()
        if name == "matmul":
            _, out = self.some(not_in=number)
            self.matmul(x, out, x.width, out.width, out if in_place else None)
        elif name == "rms_norm":
            out = x if in_place else self.some(width=x.width, not_in=number)[1]
            n_group = 1 if choice < 0.7 else 2
            step.add(
                RmsNorm(
                    x, self.ones(x.width // n_group), out, 1e-5, n_group=n_group, residual=x if choice < 0.4 else None
                )
            )
        elif name == "gated":
            other, up = self.some(width=x.width, not_in=number)
            out = x if in_place else up if choice < 0.5 else self.buffers[3 - number - other].columns(0, x.width)
            step.add(Gated(x, up, out, "silu" if choice < 0.8 else "gelu"))
        elif name == "rope":
            step.add(Rope(x, ROPE, 32))
        else:
            first, q = self.some(width=64)
            second, kv = self.some(width=32, not_in=first)
            out = self.buffers[3 - first - second].columns(32, 64)
            step.add(Attend(q, kv, kv, new_cache(self.backend, HEADS, N_CTX, N_BATCH), HEADS, out))

    def run(self) -> np.ndarray:
        """A batch, a token, a batch; all rows, then some again."""
        parts = []
        for n_past, n in ((0, 12), (12, 1), (13, 5)):
            parts.append(
                self.program.run(
                    np.arange(n_past, n_past + n, dtype=np.int32), [Run(0, n_past, n)], range(n)
                ).values.copy()
            )
            for first, count in ((n - 1, 1), (0, n)):
                parts.append(self.program.more(range(first, first + count)).copy())
        return np.concatenate(parts)


@pytest.mark.parametrize("seed", range(40))
def test_random_programs(seed: int) -> None:
    """Nearly all rows agree to float32; an int8 on the other side of a half makes differences of some percent."""
    expected = RandomProgram(seed, Q8Backend(np.float64, np.float16)).run()
    actual = RandomProgram(seed, cpu(1 + seed % 3)).run()
    errors = np.abs(actual - expected).max(1) / np.abs(expected).max(1)
    assert errors.max() < 0.1
    assert np.median(errors) < 1e-5


def test_runs_can_be_repeated() -> None:
    program = RandomProgram(3, cpu(3))
    first = program.run()
    for _ in range(3):
        np.testing.assert_array_equal(program.run(), first)


def test_more_leaves_everything_before_as_it_is() -> None:
    program = RandomProgram(5, cpu(2)).program
    ids = np.arange(12, dtype=np.int32)
    rows = program.run(ids, [Run(0, 0, 12)], range(12)).values.copy()
    assert program.run(ids, [Run(0, 0, 12)], ()).values.shape == (0, 3 * WIDTH)
    for first, count in ((3, 4), (11, 1), (0, 12), (3, 4), (0, 0)):
        # one row is computed by another kernel than several: sums in another order
        assert np.abs(program.more(range(first, first + count)) - rows[first : first + count]).max(initial=0) < 1e-4


def test_a_program_keeps_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, vectors, tables, caches and the backend itself may be dropped by whoever made it."""
    expected = RandomProgram(1, cpu(2)).run()
    monkeypatch.setattr(Arena, "_CHUNK", 64)  # else all weights and caches keep each other alive
    program = RandomProgram(1, CpuBackend(2))
    del program.step, program.buffers, program.backend
    gc.collect()
    _filler = [np.full(4096, 255, np.uint8) for _ in range(2000)]  # takes the place of what was freed
    np.testing.assert_array_equal(program.run(), expected)


def test_rotations_may_be_dropped() -> None:
    """Tables of cosines go by identity: an object at the address of one that is gone is another one all the same."""
    values = np.random.default_rng(0).standard_normal((7, 32)).astype(np.float32)
    step = Step(cpu(2), 7)
    x = step.input(values)
    freqs = [base ** -(np.arange(16) / 16) for base in range(2, 40)]
    for freq in freqs:
        step.add(Rope(x, Rotation("norm", 32, freq.copy()), 32))
    step.finish(x)
    _filler = [np.full(16, 1e3) for _ in range(500)]
    total = Rotation("norm", 32, np.sum(freqs, axis=0))  # turns add up
    expected = rotate(values.astype(np.float64)[:, None], total, np.arange(3, 10))[:, 0]
    assert error(step.run(7, 3), expected) < 1e-5


def test_rows_are_quantized_once() -> None:
    """Two matmuls share the int8 form of their input, and whatever op can make it on the way does."""
    weight = cpu(2).weight([random_tensor("Q8_0", 64, 64)])
    step = Step(cpu(2), 4)
    x, out = step.input(np.ones((4, 64), np.float32)), step.buffer(64)
    for _ in range(2):
        step.add(Matmul(x, weight, out))
    step.add(RmsNorm(x, step.vector(np.ones(64)), x, 1e-5))
    for _ in range(2):
        step.add(Matmul(x, weight, out))
    step.add(Gated(out, out, x, "silu"))
    step.add(Matmul(x, weight, out))
    step.add(Attend(out, out, out, new_cache(cpu(2), HEADS_2, 16, 4), HEADS_2, x))
    step.add(Matmul(x, weight, out))
    assert kernel_names(step.finish(out)).count("quantize") == 1


def test_a_closed_program_does_not_run() -> None:
    program = RandomProgram(0, cpu(2)).program
    ids = np.arange(3, dtype=np.int32)
    program.run(ids, [Run(0, 0, 3)], range(3))
    program.close()
    for call in (lambda: program.run(ids, [Run(0, 3, 3)], range(3)), lambda: program.more([0])):
        with pytest.raises(ValueError, match="the program is closed"):
            call()


def test_programs_of_one_backend_do_not_disturb_each_other() -> None:
    programs = [RandomProgram(seed, cpu(2)) for seed in (1, 2)]
    expected = [program.run() for program in programs]
    for i in (1, 0, 0, 1):
        np.testing.assert_array_equal(programs[i].run(), expected[i])


def test_a_program_without_outputs_leaves_its_buffers() -> None:
    step = Step(cpu(2), 5)
    values = np.random.default_rng(0).standard_normal((5, 48)).astype(np.float32)
    tensor = random_tensor("F32", 3, 48)
    out = step.buffer(3)
    step.add(Matmul(step.input(values), step.backend.weight([tensor]), out))
    program = step.backend.program(step.parts, [], out, 5, 1)
    expected = values.astype(np.float64) @ tensor.blocks().view(np.float32).T
    program.run(np.arange(5, dtype=np.int32), [Run(0, 0, 5)], ())
    assert error(program.to_host(out, 5), expected) < 1e-6
