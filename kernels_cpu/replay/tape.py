"""What is recorded of a step: its ops on a tape, their buffers, and which rows stand somewhere as int8 already."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.kernels_cpu.panels.memory import CpuBuffer, aligned
from gguf_run.kernels_cpu.panels.panels import ROWS, TOKENS, IntPanel, Panel
from gguf_run.kernels_cpu.replay.op import TapeOp
from gguf_run.kernels_cpu.replay.program import CpuProgram
from gguf_run.kernels_cpu.replay.runs import RunTable
from gguf_run.kernels_cpu.replay.team import Team
from gguf_run.kernels_cpu.rows.embed import copy_rows
from gguf_run.kernels_cpu.rows.quantize import quantize

_SHARED = ("scratch", "scratch_stride", "parts")  # fields that `finish` fills


@dataclass
class _Activations:
    """What is known of a buffer's present contents in the form that integer panels read."""

    producer: NDArray[np.void] | None = None  # the arguments of the op that can quantize what it has just made
    q8: NDArray[np.uint8] | None = None  # the quantized rows, once something wants them


class Tape:
    """Ops bound to addresses, in the order in which they run, and the memory that they share.

    keep: what has its address in an op's arguments. q8: activations as int8, by the place of the rows.
    """

    def __init__(
        self, team: Team, n_batch: int, n_outputs: int, compile_ops: Callable[[Iterable[TapeOp]], None]
    ) -> None:
        """compile_ops: called at the end with the ops of the tape."""
        self._team, self._compile = team, compile_ops
        self.n_batch, self.n_outputs, self.n_threads = n_batch, n_outputs, team.n_threads
        self.ops: list[tuple[TapeOp, NDArray[np.void]]] = []
        self.keep: list[Any] = []
        self.table = RunTable(n_batch, n_outputs)
        self.q8: dict[tuple[int, int], NDArray[np.uint8]] = {}
        self._body = -1
        self._cuts: list[int] = []
        self._scratch_bytes = self._parts_bytes = 0
        self._known: dict[int, dict[tuple[int, int], _Activations]] = {}

    @property
    def is_after(self) -> bool:
        """Whether the rows whose results are wanted have been chosen."""
        return self._body >= 0

    def need(self, *, scratch: int = 0, parts: int = 0) -> None:
        """Ops with the fields of these names get memory: `scratch` bytes for each thread, `parts` bytes for all."""
        self._scratch_bytes = max(self._scratch_bytes, scratch)
        self._parts_bytes = max(self._parts_bytes, parts)

    def record(self, op: TapeOp, **values: Any) -> NDArray[np.void]:
        """Append an op. Returns its arguments: they can still be changed."""
        names = op.fields.names or ()
        arguments = op.bind(**values, **{name: 0 for name in _SHARED if name in names})
        self.ops.append((op, arguments))
        return arguments

    def written(self, out: CpuBuffer, producer: NDArray[np.void] | None = None) -> None:
        """Columns of out's memory have new contents."""
        known = self._known[id(out.memory)] = {}
        if producer is not None and out.width % 32 == 0:
            known[out.address, out.width] = _Activations(producer)

    def quantized(self, x: CpuBuffer) -> NDArray[np.uint8]:
        """x's rows as activation blocks: by the op that made x, if it can, else by an op of its own; once."""
        key = (x.address, x.width)
        known = self._known.setdefault(id(x.memory), {}).setdefault(key, _Activations())
        if known.q8 is None:
            if key not in self.q8:
                self.q8[key] = aligned(len(x.memory) * 2 * x.width)
            known.q8 = self.q8[key]
            q8 = {"q8": known.q8.ctypes.data, "q8_stride": 2 * x.width}
            if known.producer is not None:
                for name, value in q8.items():
                    known.producer[name] = value
            else:
                self.record(quantize, rows=x.rows, n=x.width, x=x.address, x_stride=x.stride, **q8)
        return known.q8

    def buffer(self, width: int) -> CpuBuffer:
        after = self.is_after
        n_rows = -(-(self.n_outputs if after else self.n_batch) // TOKENS) * TOKENS
        stride = -(-width // ROWS) * ROWS
        memory = aligned(4 * n_rows * stride).view(np.float32).reshape(n_rows, stride)
        self.keep.append(memory)
        return CpuBuffer(memory, self.table.n_out if after else self.table.n_tokens, 0, width)

    def rows_of(self, x: CpuBuffer, panel: Panel) -> tuple[int, int]:
        """Address and stride of x's rows in the form that a panel is multiplied with."""
        if isinstance(panel, IntPanel):
            return self.quantized(x).ctypes.data, 2 * x.width
        return x.address, x.stride

    def cut(self) -> None:
        self._cuts.append(len(self.ops))
        self._known.clear()

    def outputs(self, x: CpuBuffer) -> CpuBuffer:
        self._body = len(self.ops)
        out = self.buffer(x.width)
        self.record(
            copy_rows,
            rows=out.rows,
            index=self.table.rows.ctypes.data,
            n=x.width,
            x=x.address,
            x_stride=x.stride,
            out=out.address,
            out_stride=out.stride,
        )
        self.written(out)
        return out

    def finish(self, result: CpuBuffer) -> "CpuProgram":
        """Give the ops their shared memory, compile them, and lay out the tape."""
        self._compile(dict.fromkeys(op for op, _ in self.ops))
        n_threads = self.n_threads
        stride = -(-self._scratch_bytes // 64) * 64
        scratch, parts = aligned(stride * n_threads), aligned(self._parts_bytes)
        shared = dict(zip(_SHARED, (scratch.ctypes.data, stride, parts.ctypes.data), strict=True))
        for op, arguments in self.ops:
            for name in shared.keys() & set(op.fields.names or ()):
                arguments[name] = shared[name]
        tape = np.array([(op.compiled.address, arguments.ctypes.data) for op, arguments in self.ops], np.int64)
        keep = [self.keep, [arguments for _, arguments in self.ops], self.q8, scratch, parts]
        body = self._body if self.is_after else len(tape)
        return CpuProgram(self._team, tape, body, self._cuts, self.table, result, keep)
