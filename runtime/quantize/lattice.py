"""`--keep-lattice`: tensors that were trained for the grid of their type keep its codes.

Blocks without a step from which all weights come back go to the rounding that the tensor has otherwise.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.errors import OptionError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.quantizers.lattice import LATTICES, recover
from gguf_run.runtime.quantize.item import Item, Rounding
from gguf_run.runtime.quantize.plan import Plan

_N_SAMPLES, _SAMPLE = 8, 1 << 11  # pieces of a tensor that are looked at, and the least weights of each
_ENOUGH = 0.99  # part of the sampled blocks that must fit


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
