"""Which ops store their result as int8 too: a pass over the list of ops, before any kernel is chosen.

Integer panels read rows as int8. An op that makes whole rows can store their int8 form at no cost. Where no such op
makes what an integer panel reads, the pass puts a Quantize op in front of the reader.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.frozen import frozen
from gguf_run.kernels_cpu.attention.cache import CpuCache
from gguf_run.kernels_cpu.panels.memory import CpuTable, CpuWeight
from gguf_run.kernels_cpu.panels.panels import IntPanel
from gguf_run.models import ops
from gguf_run.models.operands import Buffer

if TYPE_CHECKING:  # most models have no experts and no recurrent layers
    from gguf_run.kernels_cpu.matmul.moe import CpuExperts
    from gguf_run.kernels_cpu.recurrent.state import CpuState
    from gguf_run.kernels_cpu.rows.observe import CpuSquares
    from gguf_run.models.protocol import Op

CpuVector: TypeAlias = NDArray[np.float32]
CpuOp: TypeAlias = "Op[CpuTable, CpuWeight, CpuVector, CpuCache, CpuExperts, CpuSquares, CpuState]"
# Ops that can store their result as int8, if it has one group. Names, as the classes of rare ops are not imported.
_MAKE_INT8 = ("RmsNorm", "LayerNorm", "MatmulGated", "Gated", "Xielu", "Attend")


@frozen
class Quantize:
    """Make the int8 form of x, where the op that makes x cannot."""

    x: Buffer


def with_int8(step: Sequence[CpuOp]) -> "Iterator[tuple[CpuOp | Quantize, Buffer | None]]":
    """Yield the ops and the Quantize ops in their order, each with its `out` if it makes that as int8 too."""
    ready: set[Buffer] = set()  # whose present contents have an int8 form
    for i, op in enumerate(step):
        x = _read_as_int8(op)
        if x is not None and x not in ready:
            yield Quantize(x), None
            ready.add(x)
        out = ops.written(op)
        if out is None:
            yield op, None
            continue
        int8 = out if _can_make_int8(op) and _is_read_as_int8(out, step[i + 1 :]) else None
        ready = {buffer for buffer in ready if buffer.name != out.name} | ({int8} if int8 else set())
        yield op, int8


def _read_as_int8(op: Any) -> Buffer | None:
    """Return the buffer that an op reads as int8."""
    held = vars(op)  # the classes of rare ops are not imported here
    parts = [held["experts"].gate] if "experts" in held else getattr(held.get("weight"), "parts", ())
    return op.x if any(isinstance(part.panel, IntPanel) for part in parts) else None


def _can_make_int8(op: Any) -> bool:
    return type(op).__name__ in _MAKE_INT8 and vars(op).get("n_group", 1) == 1


def _is_read_as_int8(buffer: Buffer, following: Sequence[CpuOp]) -> bool:
    """Whether a following op reads the present contents of a buffer as int8."""
    for op in following:
        if _read_as_int8(op) == buffer:
            return True
        if (out := ops.written(op)) is not None and out.name == buffer.name:
            break
    return False
