"""What becomes of a list of ops on a GPU, by comparing lists: without torch, Triton or a GPU."""

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from gguf_run.kernels_gpu.fuse import Angles, Convert, FusedAttention, FusedMatmul, FusedMoe, FusedNorm, fuse
from gguf_run.models.operands import AttentionShape, Buffer, Rotation
from gguf_run.models.ops import Attend, Embed, Gated, Matmul, MatmulGated, Observe, Outputs, RmsNorm, Rope
from gguf_run.models.rare_ops import Moe
from gguf_run.models.routing import Mixture

INT8, HALVES = frozenset({"int8"}), frozenset({"halves"})
X, H, FF, OUT = (Buffer.whole(name, width) for name, width in (("x", 64), ("h", 64), ("ff", 96), ("out", 64)))
QKV = Buffer.whole("qkv", 192)
Q, K, V = QKV.columns(0, 64), QKV.columns(64, 64), QKV.columns(128, 64)
SHAPE = AttentionShape(2, 2, 32, 0.1)
ROTATION = Rotation("norm", 32, np.ones(16))
ATTEND = Attend(Q, K, V, "cache", SHAPE, OUT)
ROPE = Rope(QKV.columns(0, 128), ROTATION, 32)


@dataclass(frozen=True)
class Weight:
    """What fuse asks of weights and of experts."""

    n_in: int = 64
    n_out: int = 64
    n_part: int = 1
    reads_int8: bool = True
    reads_halves: bool = True


W, F16, F32 = Weight(), Weight(reads_int8=False), Weight(reads_int8=False, reads_halves=False)
MIXED = Weight(n_part=2)


def norm(x: Buffer, out: Buffer, **options: Any) -> RmsNorm[Any]:
    return RmsNorm(x, "weight", out, 1e-5, **options)


def both(*ops: Any) -> tuple[list[Any], list[Any]]:
    return fuse(ops, few=True), fuse(ops, few=False)


def test_a_layer_of_llama() -> None:
    """7 launches for a few tokens: attention has 3."""
    gate_up, down = Weight(n_out=192), Weight(n_in=96)
    first, second = norm(X, H), norm(X, H)
    qkv, output = Matmul(H, Weight(n_out=192), QKV), Matmul(OUT, W, X, residual=X)
    gated, last = MatmulGated(H, gate_up, FF, "silu"), Matmul(FF, down, X, residual=X)
    few, many = both(first, qkv, ROPE, ATTEND, output, second, gated, last)
    assert few == [
        Angles(ROTATION),
        FusedNorm(first, INT8),
        FusedMatmul(qkv, True),
        FusedAttention(ATTEND, True, ROTATION, (), INT8),
        FusedMatmul(output, True, (second,), INT8),
        FusedMatmul(gated, True, (), INT8),
        FusedMatmul(last, True),
    ]
    assert many == [
        Angles(ROTATION),
        FusedNorm(first, HALVES),
        FusedMatmul(qkv, False),
        FusedAttention(ATTEND, False, ROTATION),
        Convert(OUT, "halves"),
        FusedMatmul(output, False),
        FusedNorm(second, HALVES),
        FusedMatmul(gated, False),
        Convert(FF, "halves"),
        FusedMatmul(last, False),
    ]


def test_two_norms_after_a_product() -> None:
    """As gemma's: a norm with a residual, then the norm that the next product reads. A third one stands by itself."""
    product, one, two, three = Matmul(H, W, OUT), norm(OUT, X, residual=X), norm(X, H), norm(H, FF.columns(0, 64))
    reader = Matmul(H, W, OUT)
    few, _ = both(product, one, two, reader)
    assert few[1:] == [FusedMatmul(product, True, (one, two), INT8), FusedMatmul(reader, True)]
    few, _ = both(product, one, two, three)
    assert few[1:] == [FusedMatmul(product, True, (one, two)), FusedNorm(three)]
    again = norm(X, X, residual=H)
    assert both(product, one, again)[0][1:] == [FusedMatmul(product, True, (one,)), FusedNorm(again)]
    # What the first norm makes is no form that the product writes.
    reader = Matmul(X, W, OUT)
    assert both(product, one, two, reader)[0][2:] == [Convert(X, "int8"), FusedMatmul(reader, True)]


@pytest.mark.parametrize(
    ("product", "after"),
    [
        (Matmul(H, F16, OUT), norm(OUT, H)),  # a kernel that norms nothing
        (Matmul(H, MIXED, OUT), norm(OUT, H)),  # whose parts are launched one after the other
        (Matmul(H, W, OUT), norm(X, H)),  # of something else
        (Matmul(H, W, OUT), norm(OUT.columns(0, 32), H.columns(0, 32))),  # of a part of the rows
        (Matmul(H, W, OUT), norm(OUT, OUT, n_group=2)),
        (MatmulGated(H, Weight(n_out=128), OUT, "silu"), norm(OUT, H)),
    ],
)
def test_norms_that_stand_by_themselves(product: Any, after: RmsNorm[Any]) -> None:
    assert both(product, after)[0][-2:] == [FusedMatmul(product, True), FusedNorm(after)]


def test_norms_of_heads() -> None:
    """In attention, in its first kernel: only those of q and then k, in place, with one eps."""
    q, k = norm(Q, Q, n_group=2), norm(K, K, n_group=2)
    for result in both(q, k, ROPE, ATTEND):
        assert [(op.rotation, op.norms) for op in result[1:]] == [(ROTATION, (q, k))]
    assert both(q, k, ATTEND)[0] == [FusedAttention(ATTEND, True, None, (q, k))]
    for others in ([k, q], [k], [q, norm(K, K, n_group=1)], [q, RmsNorm(K, "weight", K, 1e-6, 2)]):
        assert both(*others, ATTEND)[0] == [*map(FusedNorm, others), FusedAttention(ATTEND, True)]


@pytest.mark.parametrize("x", [Q, QKV, QKV.columns(64, 128)])
def test_rope_of_something_else(x: Buffer) -> None:
    rope = Rope(x, ROTATION, 32)
    assert both(rope, ATTEND)[0] == [Angles(ROTATION), rope, FusedAttention(ATTEND, True)]


def test_angles_come_first_and_once() -> None:
    other = Rotation("neox", 32, np.ones(16))
    again = Rope(ROPE.x, other, 32)
    ops = (Embed("table", X), ROPE, ATTEND, ROPE, again, ATTEND)
    assert both(*ops)[0][:3] == [Angles(ROTATION), Angles(other), Embed("table", X)]
    assert [op for op in fuse(ops, few=True, known={ROTATION}) if isinstance(op, Angles)] == [Angles(other)]


def test_a_gated_product_of_several_parts() -> None:
    weight = Weight(n_out=192, n_part=2)
    op = MatmulGated(H, weight, FF, "gelu", "bias")
    wide = Buffer.whole("gate_up 192", 192)
    gated = Gated(wide.columns(0, 96), wide.columns(96, 96), FF, "gelu")
    for few, result in zip((True, False), both(op), strict=True):
        assert result[1:] == [FusedMatmul(Matmul(H, weight, wide, "bias"), few), gated]
    h, ff = (Buffer.whole(name, width, outputs=True) for name, width in (("h2", 64), ("ff2", 96)))
    assert both(MatmulGated(h, weight, ff, "gelu"))[0][1].op.out == Buffer.whole(
        "gate_up 192 outputs", 192, outputs=True
    )


def test_forms_are_made_once_for_all_readers() -> None:
    """And anew when the buffer has changed; other columns of its memory are other contents."""
    readers = [Matmul(H, W, OUT), Matmul(H, MIXED, OUT), Matmul(H, F32, OUT)]
    first, changed = norm(X, H), Gated(H, None, H, "silu")
    few, many = both(first, *readers, changed, readers[0])
    assert few[0] == FusedNorm(first, INT8)
    assert many[0] == FusedNorm(first, HALVES)
    for result, form in ((few, "int8"), (many, "halves")):
        assert [op for op in result if isinstance(op, Convert)] == [Convert(H, form)]
        assert result[-3:-1] == [changed, Convert(H, form)]
    part = Matmul(H.columns(0, 32), Weight(n_in=32), OUT)
    assert both(first, part)[0][:2] == [FusedNorm(first), Convert(part.x, "int8")]


def test_floats_are_read_as_they_are() -> None:
    """Few tokens in f32, many in f16; F32 always in f32."""
    for weight, forms in ((F16, HALVES), (F32, frozenset())):
        few, many = both(norm(X, H), Matmul(H, weight, OUT))
        assert (few[0].forms, many[0].forms) == (frozenset(), forms)
        assert len(few) == len(many) == 2


def test_what_cannot_write_int8() -> None:
    """Norms of parts of rows, heads that are no power of two, rows that are no whole blocks."""
    grouped = norm(X, X, n_group=2)
    assert both(grouped, Matmul(X, W, OUT))[0][:2] == [FusedNorm(grouped), Convert(X, "int8")]
    attend = Attend(Q, K, V, "cache", AttentionShape(1, 1, 48, 0.1), OUT)
    assert both(attend, Matmul(OUT, W, X))[0][1] == Convert(OUT, "int8")
    ff = Buffer.whole("ff", 48)
    gated = MatmulGated(H, Weight(n_out=96), ff, "silu")
    assert both(gated, Matmul(ff, Weight(n_in=48), X))[0][1:3] == [FusedMatmul(gated, True), Convert(ff, "int8")]


def test_experts() -> None:
    """Few tokens as int8 where all panels are integers; as f16 while something is observed."""
    logits, mixture = Buffer.whole("logits", 4), Mixture(2, True, 1.0, "silu")
    first, router = norm(X, H), Matmul(H, W, logits)
    for weight, squares, form in ((W, None, "int8"), (W, ("a", "b"), "halves"), (F16, None, "halves")):
        moe = Moe(H, logits, weight, mixture, X, squares)
        few, many = both(first, router, moe)
        assert few == [FusedNorm(first, INT8 | {form}), FusedMatmul(router, True), FusedMoe(moe, form)]
        assert many == [FusedNorm(first, HALVES), FusedMatmul(router, False), FusedMoe(moe, "halves")]


def test_other_ops_stay() -> None:
    ops = [Outputs(X, Buffer.whole("x out", 64, outputs=True)), Observe(X, "squares"), Gated(FF, None, FF, "silu")]
    for result in both(*ops):
        assert result == ops


def test_fuse_and_sizes_need_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['triton'] = None; import gguf_run.kernels_gpu.{}"
    for module in ("fuse", "sizes"):
        subprocess.run([sys.executable, "-c", code.format(module)], check=True)
