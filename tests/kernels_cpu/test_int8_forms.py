"""Which op makes the int8 form of a row: lists in, lists out."""

from types import SimpleNamespace
from typing import Any

from gguf_run.kernels_cpu.int8_forms import Quantize, with_int8
from gguf_run.kernels_cpu.panels.panels import PANEL_OF
from gguf_run.models.operands import Buffer
from gguf_run.models.ops import Embed, Gated, Matmul, RmsNorm, Rope

X, H, Y = (Buffer.whole(name, 64) for name in "xhy")
WEIGHT: Any = SimpleNamespace(parts=[SimpleNamespace(panel=PANEL_OF["Q8_0"])])
FLOATS: Any = SimpleNamespace(parts=[SimpleNamespace(panel=PANEL_OF["F16"])])
NONE: Any = None


def check(step: list[Any], expected: list[Any]) -> None:
    """expected: the ops; those that make int8 too stand in a tuple with their buffer."""
    assert list(with_int8(step)) == [op if isinstance(op, tuple) else (op, None) for op in expected]


def test_an_op_that_can_makes_it() -> None:
    norm, read = RmsNorm(X, NONE, H, 1e-5), Matmul(H, WEIGHT, Y)
    check([norm, read, read], [(norm, H), read, read])
    gated = Gated(H, None, H, "silu")
    check([norm, read, gated, read], [(norm, H), read, (gated, H), read])


def test_nobody_makes_it_for_floats() -> None:
    norm, read = RmsNorm(X, NONE, H, 1e-5), Matmul(H, FLOATS, Y)
    check([norm, read], [norm, read])


def test_else_there_is_an_op_of_its_own_once() -> None:
    embed, read = Embed(NONE, X), Matmul(X, WEIGHT, Y)
    check([embed, read, read], [embed, Quantize(X), read, read])
    turn = Rope(X, NONE, 32)
    check([embed, read, turn, read], [embed, Quantize(X), read, turn, Quantize(X), read])
    heads = RmsNorm(X, NONE, X, 1e-5, n_group=2)
    check([heads, read], [heads, Quantize(X), read])


def test_other_columns_are_another_form() -> None:
    norm, read = RmsNorm(X, NONE, H, 1e-5), Matmul(H.columns(0, 32), WEIGHT, Y)
    check([norm, read], [norm, Quantize(H.columns(0, 32)), read])
    change = RmsNorm(H.columns(32, 32), NONE, H.columns(32, 32), 1e-5)
    check([norm, read, change, read], [norm, Quantize(read.x), read, change, Quantize(read.x), read])


def test_what_is_overwritten_before_it_is_read_is_not_made() -> None:
    norm, read = RmsNorm(X, NONE, H, 1e-5), Matmul(H, WEIGHT, Y)
    check([norm, norm, read], [norm, (norm, H), read])
