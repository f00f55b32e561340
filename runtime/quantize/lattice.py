"""Weights that were trained for a grid keep its codes: `--keep-lattice`.

A checkpoint of such a training holds the weights d * q (+ m) rounded to F16 or BF16. Quantizing it anew takes d from
those rounded numbers, and moves codes. Here the d of a block is the half float with which every stored weight comes
back, bit for bit, so that nothing is lost. A block without such a d goes to the rounding that the tensor has otherwise.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.codes import Codes, pack
from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import TensorType
from gguf_run.formats.blocks.unpack import INTEGER_FORMS, IntegerForm
from gguf_run.formats.errors import OptionError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.runtime.quantize.item import Item, Rounding
from gguf_run.runtime.quantize.plan import Plan

LATTICES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # types whose scales are half floats, without a shared factor
_N_SAMPLES, _SAMPLE = 8, 1 << 11  # pieces of a tensor that are looked at, and the least weights of each
_ENOUGH = 0.99  # part of the sampled blocks that must fit
# Numbers that a checkpoint may hold, coarsest first: bits of the mantissa, exponent of the least number.
_BF16, _F16, _F32 = (8, -133), (11, -24), (24, -149)
_Float = NDArray[np.float64]


def _unit(x: _Float, kind: tuple[int, int]) -> _Float:
    """Return the distance of neighbouring numbers of a kind near x."""
    return np.ldexp(1.0, np.maximum(np.frexp(x)[1] - kind[0], kind[1]))


def _rounded(x: _Float, kind: tuple[int, int]) -> _Float:
    """Return the nearest numbers of a kind, halves to even."""
    unit = _unit(x, kind)
    return np.rint(x / unit) * unit


def _half(x: _Float) -> _Float:
    return x.astype(np.float16).astype(np.float64)


def _trial(
    w: _Float, m: _Float, peak: int, form: IntegerForm, kind: tuple[int, int]
) -> tuple[NDArray[np.int8], _Float, NDArray[np.bool_]]:
    """Return the codes of blocks w [n, 32] whose largest weight has the code -peak or peak, their d, and which fit.

    Every stored weight was rounded, and so allows an interval of d. If d of the largest one does not give all weights
    back, the middle of all intervals is tried.
    """
    y = w - m
    top = np.take_along_axis(y, np.abs(y).argmax(axis=1, keepdims=True), axis=1)
    d = top / -peak if peak > form.q_max else np.abs(top) / peak
    q = np.nan_to_num(np.rint(y / d)).clip(form.q_min, form.q_max)
    reach = np.where(q != 0, _unit(w, kind) / np.abs(2 * q), np.inf)
    centre = np.where(q != 0, y / q, 0)
    middle = ((centre - reach).max(axis=1, keepdims=True) + (centre + reach).min(axis=1, keepdims=True)) / 2
    fits = np.zeros(len(w), np.bool_)
    found = np.zeros_like(d)
    for step in (_half(middle), _half(d)):
        good = (_rounded((step * q + m).astype(np.float32).astype(np.float64), kind) == w).all(axis=1)
        found[good], fits = step[good], fits | good
    return q.astype(np.int8), found, fits


def recover(x: NDArray[np.float32], type: TensorType) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return blocks uint8[n_rows, n / 32, type_size] and which of them give the weights x f32[n_rows, n] exactly.

    Exactly: rounded to the coarsest of BF16, F16 and F32 that holds x, they are x. -0.0 may become 0.0.
    type: one of LATTICES.
    The largest weight of a block, less m, is tried as every integer of the type, from the largest on: as ggml writes
    it, first. m is the least weight.
    """
    form = INTEGER_FORMS[type.name]
    w = x.reshape(-1, type.block_size).astype(np.float64)
    q, d, fits = np.zeros(w.shape, np.int8), np.zeros((len(w), 1)), np.zeros(len(w), np.bool_)
    with np.errstate(all="ignore"):
        kind = next((kind for kind in (_BF16, _F16) if (_rounded(w, kind) == w).all()), _F32)
        m = w.min(axis=1, keepdims=True) if form.has_minimum else np.zeros((len(w), 1))
        left = np.flatnonzero(np.isfinite(w).all(axis=1) & (_half(m) == m)[:, 0])
        for peak in range(min(-form.q_min or form.q_max, 127), 0, -1):
            q[left], d[left], fits[left] = _trial(w[left], m[left], peak, form, kind)
            left = left[~fits[left]]
            if not left.size:
                break
    scale, minimum = (v.astype(np.float32).reshape(len(x), -1) for v in (d, m if form.has_minimum else m[:0]))
    factor = np.ones((len(x), scale.shape[1], 2), np.float32)
    blocks = pack(Codes(type, q.reshape(x.shape), scale, minimum, factor))
    return blocks.reshape(*scale.shape, -1), fits.reshape(scale.shape)


@dataclass(frozen=True)
class KeepLattice:
    """A Rounding that keeps the codes of blocks on the lattice of their type, and gives the others to the next one."""

    next: Rounding

    def __call__(self, item: Item, x: NDArray[np.float32], first: int) -> NDArray[np.uint8]:
        blocks, fits = recover(x, item.target.type)
        if not fits.all():
            blocks = np.where(fits[..., None], blocks, self.next(item, x, first).reshape(blocks.shape))
        return blocks.reshape(len(x), -1)


def with_lattice(plan: Plan) -> Plan:
    """Return the plan in which tensors on the lattice of their type keep its codes. A note counts the others.

    Some rows of each tensor are read. OptionError if no tensor gets one of the types LATTICES.
    """
    items: list[Item] = []
    without: list[str] = []
    n_kept = 0
    for item in plan.items:
        if not item.is_copy and item.target.type.name in LATTICES:
            if _has_lattice(item):
                item, n_kept = replace(item, rounding=KeepLattice(item.rounding)), n_kept + 1
            else:
                without.append(item.target.name)
        items.append(item)
    if not n_kept + len(without):
        raise OptionError(f"--keep-lattice: no tensor becomes one of {', '.join(LATTICES)}: choose such a TYPE")
    note = f"{n_kept} tensors are on the lattice of their type and keep its codes"
    if without:
        note += f", {len(without)} have no lattice and are rounded as usual: {quoted(without[0])}"
        note += ", ..." if len(without) > 1 else ""
    return replace(plan, items=items, notes=[*plan.notes, note])


def _has_lattice(item: Item) -> bool:
    source, step = item.source, max(1, _SAMPLE // item.source.ne[0])
    firsts = {max(0, (source.n_rows - step) * i // (_N_SAMPLES - 1)) for i in range(_N_SAMPLES)}
    samples = [dequantize(source.blocks(first, min(first + step, source.n_rows)), source.type) for first in firsts]
    return float(recover(np.concatenate(samples), item.target.type)[1].mean()) >= _ENOUGH
