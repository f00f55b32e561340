"""Rewrites the ops of a step for the GPU: fewer launches, and activations in the forms that products read.

`fuse` turns a list of models.ops into another list: pure data, no torch, no Triton. launch.py launches the result. Few
tokens and many have kernels of their own, so each kind has a list of its own.

What becomes one op:
- Rope before attention, and RMS norms of the heads of q and k before that: attention's first kernel does both.
- for few tokens, a product of one integer panel and up to two RMS norms of its rows: the product's last program norms.

Forms: integer panels are multiplied with int8 activations for few tokens; for many tokens all panels but F32 are
multiplied with f16 activations ("halves"). If the op that computes a buffer can write the form too, it does. Otherwise
a Convert comes before the first reader.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from gguf_run.models.operands import Buffer, Rotation
from gguf_run.models.ops import Attend, Gated, Matmul, MatmulGated, RmsNorm, Rope, written
from gguf_run.models.rare_ops import Moe

Form = Literal["int8", "halves"]
Forms = frozenset[Form]
NONE: Forms = frozenset()
BLOCK = 32  # columns of a block of int8 activations


@dataclass(frozen=True)
class Angles:
    """Compute the cosines and sines of a rotation for the tokens of the step."""

    rotation: Rotation
    outputs: bool = False  # for the tokens whose results are wanted, as in Buffer


@dataclass(frozen=True)
class Convert:
    """Write x in a form that products read."""

    x: Buffer
    form: Form


@dataclass(frozen=True)
class FusedNorm:
    """An RMS norm that may write its result in other forms too."""

    op: RmsNorm[Any]
    forms: Forms = NONE


@dataclass(frozen=True)
class FusedMatmul:
    """A product whose last program may norm the rows of the result."""

    op: Matmul[Any, Any] | MatmulGated[Any, Any]
    few: bool  # whether the kernels are those for few tokens
    norms: tuple[RmsNorm[Any], ...] = ()  # the first one reads op.out, the second one what the first one writes
    forms: Forms = NONE  # other forms that the last result is written in

    @property
    def is_int(self) -> bool:
        """Whether the whole matrix is one integer panel."""
        return bool(self.op.weight.reads_int8 and self.op.weight.n_part == 1)


@dataclass(frozen=True)
class FusedAttention:
    """Attention that may norm and turn the heads of q and k."""

    op: Attend[Any, Any]
    few: bool
    rotation: Rotation | None = None  # of q and k; None: they are turned already, or do not turn
    norms: tuple[RmsNorm[Any], ...] = ()  # of the heads of q, and of k if there is one, with one eps
    forms: Forms = NONE


@dataclass(frozen=True)
class FusedMoe:
    """A mixture of experts, and how its products read x."""

    op: Moe[Any, Any, Any]
    form: Form  # int8 for few tokens and integer panels, if nothing is observed


def fuse(ops: Iterable[Any], *, few: bool, known: Collection[Rotation] = ()) -> list[Any]:
    """Rewrite the ops of one part of a program, for few tokens (up to tuning.FEW) or for more.

    Weights tell n_part, reads_int8 and reads_halves, experts reads_int8, as panels.memory describes them.
    known: rotations whose Angles an earlier part computes. Angles of the others come first.
    """
    fused: list[Any] = []
    angles: list[Any] = []
    for op in ops:
        if isinstance(op, Rope) and op.rotation not in known:
            angles.append(Angles(op.rotation, op.x.outputs))
        _append(fused, op, few)
    return list(dict.fromkeys(angles)) + _with_forms(fused, few)


def _append(fused: list[Any], op: Any, few: bool) -> None:
    """Append an op to a list, or make it one op with the last ones of the list."""
    if isinstance(op, Matmul):
        fused.append(FusedMatmul(op, few))
    elif isinstance(op, MatmulGated):
        fused += _gated_product(op, few)
    elif isinstance(op, RmsNorm):
        if fused and _can_norm(fused[-1], op):
            fused[-1] = replace(fused[-1], norms=(*fused[-1].norms, op))
        else:
            fused.append(FusedNorm(op))
    elif isinstance(op, Attend):
        rotation = _take_rotation(fused, op)
        fused.append(FusedAttention(op, few, rotation, _take_norms(fused, op)))
    elif isinstance(op, Moe):
        is_int8 = few and op.experts.reads_int8 and op.squares is None
        fused.append(FusedMoe(op, "int8" if is_int8 else "halves"))
    else:
        fused.append(op)


def _gated_product(op: MatmulGated[Any, Any], few: bool) -> list[Any]:
    """One integer panel: the product gates. Else gate and up go through a buffer."""
    product = FusedMatmul(op, few)
    if product.is_int:
        return [product]
    n, outputs = op.weight.n_out, op.out.outputs
    both = Buffer.whole(f"gate_up {n}{' outputs' * outputs}", n, outputs=outputs)
    matmul = Matmul(op.x, op.weight, both, op.bias)
    return [
        FusedMatmul(matmul, few),
        Gated(both.columns(0, n // 2), both.columns(n // 2, n // 2), op.out, op.activation),
    ]


def _can_norm(last: Any, norm: RmsNorm[Any]) -> bool:
    """Whether the last op of a list is a product that can norm its rows as `norm` does."""
    if not (isinstance(last, FusedMatmul) and last.few and last.is_int and isinstance(last.op, Matmul)):
        return False
    made = last.norms[-1].out if last.norms else last.op.out
    is_possible = not last.norms or (len(last.norms) == 1 and norm.residual is None)
    return is_possible and norm.x == made and norm.n_group == 1


def _take_rotation(fused: list[Any], op: Attend[Any, Any]) -> Rotation | None:
    """Remove a Rope of just q and k from the end of the list; return its rotation."""
    last, q, k = fused[-1] if fused else None, op.q, op.k
    if not isinstance(last, Rope):
        return None
    both = q if k is None else replace(q, width=q.width + k.width)
    if last.x != both or (k is not None and k != replace(both, start=q.start + q.width, width=k.width)):
        return None
    fused.pop()
    return last.rotation


def _take_norms(fused: list[Any], op: Attend[Any, Any]) -> tuple[RmsNorm[Any], ...]:
    """If the list ends with norms of the heads of q and k, remove and return them. Else return ()."""
    heads = [(op.q, op.shape.n_head), (op.k, op.shape.n_head_kv)][: 1 if op.k is None else 2]
    norms = tuple(last.op for last in fused[-len(heads) :] if isinstance(last, FusedNorm))
    if [(norm.x, norm.n_group) for norm in norms] != heads:
        return ()
    if norms[0].eps != norms[-1].eps or any(norm.out != norm.x or norm.residual or norm.is_grouped for norm in norms):
        return ()
    del fused[-len(heads) :]
    return norms


def _with_forms(ops: Sequence[Any], few: bool) -> list[Any]:
    """Have each form that is read written: by the op that computes the buffer, or by a Convert before the reader."""
    result: list[Any] = []
    present: set[tuple[Buffer, Form]] = set()
    for i, op in enumerate(ops):
        read = _read(op)
        if read is not None and read not in present:
            result.append(Convert(*read))
            present.add(read)
        changed = {buffer.name for buffer in _written(op)}
        present = {form for form in present if form[0].name not in changed}
        made = [form for form in _possible(op) if _is_read(form, ops[i + 1 :])]
        present.update(made)
        result.append(replace(op, forms=frozenset(form for _, form in made)) if made else op)
    return result


def _read(op: Any) -> tuple[Buffer, Form] | None:
    """Return the buffer that a product reads in a form, and the form."""
    if isinstance(op, FusedMoe):
        return op.op.x, op.form
    if isinstance(op, FusedMatmul) and op.few:
        return (op.op.x, "int8") if op.op.weight.reads_int8 else None
    if isinstance(op, FusedMatmul):
        return (op.op.x, "halves") if op.op.weight.reads_halves else None
    return None


def _is_read(form: tuple[Buffer, Form], later: Sequence[Any]) -> bool:
    """Return whether a later op reads a form before its buffer changes."""
    for op in later:
        if _read(op) == form:
            return True
        if any(buffer.name == form[0].name for buffer in _written(op)):
            return False
    return False


def _written(op: Any) -> list[Buffer]:
    """Return the buffers whose contents an op replaces."""
    if isinstance(op, Angles | Convert):
        return []
    if isinstance(op, FusedMatmul):
        return [op.op.out, *(norm.out for norm in op.norms)]
    if isinstance(op, FusedAttention):
        return [op.op.q, op.op.out]
    buffer = written(op.op if isinstance(op, FusedNorm | FusedMoe) else op)
    return [] if buffer is None else [buffer]


def _possible(op: Any) -> list[tuple[Buffer, Form]]:
    """Return the forms that an op can write of what it computes."""
    if isinstance(op, FusedNorm) and op.op.n_group == 1:
        return [(op.op.out, "int8"), (op.op.out, "halves")]
    if isinstance(op, FusedMatmul) and op.norms:
        return [(op.norms[-1].out, "int8")]
    if isinstance(op, FusedMatmul) and op.few and isinstance(op.op, MatmulGated) and op.op.out.width % BLOCK == 0:
        return [(op.op.out, "int8")]
    if isinstance(op, FusedAttention) and op.few:
        n_value = op.op.shape.n_value
        is_power = n_value & (n_value - 1) == 0
        return [(op.op.out, "int8")] if is_power and n_value >= BLOCK else []
    return []
