"""A tape: kernels bound to addresses in the order in which they run, and their memory. A program runs a tape."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gguf_run.kernels_cpu.panels.memory import LANES, aligned
from gguf_run.kernels_cpu.panels.panels import ROWS, TOKENS, IntPanel, Panel, x_stride
from gguf_run.kernels_cpu.replay.op import TapeOp
from gguf_run.kernels_cpu.replay.runs import RunTable
from gguf_run.kernels_cpu.replay.team import Team
from gguf_run.kernels_cpu.vector.isa import Tuning
from gguf_run.models.backend import Results, Run, Tops
from gguf_run.models.operands import Buffer, Rotation

if TYPE_CHECKING:
    from gguf_run.models.protocol import Program


class Rows(NamedTuple):
    """Where rows are."""

    address: int
    stride: int  # bytes from one row to the next


_TOKENS = ("ids", "positions", "run_of", "runs")  # fields of kernels that describe the tokens of the rows
Value: TypeAlias = "Buffer | Rows | NDArray[np.generic] | int | float | None"


class Tape:
    """Kernels are recorded; `finish` lays them out for the team of threads.

    The tape keeps alive whatever has its address in a kernel's arguments.
    """

    def __init__(self, n_threads: int, n_batch: int, n_outputs: int, *, splits: bool = True) -> None:
        """splits: attention may split the positions of a sequence, see CpuBackend."""
        self.n_threads, self.n_batch, self.n_outputs = n_threads, n_batch, n_outputs
        self.kernels: list[TapeOp] = []
        self.table = table = RunTable(n_batch, n_outputs)
        self._arguments: list[NDArray[np.void]] = []
        self._kept: dict[int, NDArray[np.generic]] = {}
        # cos and sin of the positions of a step, and of the tokens whose results are wanted
        self.angles: dict[tuple[Rotation, bool], NDArray[np.float32]] = {}
        self._buffers: dict[str, NDArray[np.float32]] = {}
        self._int8: dict[Buffer, NDArray[np.uint8]] = {}
        self._shared: dict[tuple[str, int], NDArray[np.uint8]] = {}
        self._scratch_bytes = self._parts_bytes = 0
        self.need(scratch=4 * TOKENS * ROWS)
        self.zeros = Rows(self.address(aligned(4 * LANES)), 0)
        # Fields that mean the same in all kernels. `finish` fills the first three.
        self._common: dict[str, float] = {"scratch": 0, "scratch_stride": 0, "parts": 0, "n_runs": table.n_runs}
        self._common |= vars(Tuning()) | {"splits": splits}
        self._common |= {name: self.address(getattr(table, name)) for name in _TOKENS}

    def address(self, array: NDArray[np.generic]) -> int:
        """Keep an array alive and return its address."""
        self._kept[id(array)] = array
        return array.ctypes.data

    def need(self, *, scratch: int = 0, parts: int = 0) -> None:
        """Kernels with the fields of these names get memory: `scratch` bytes for each thread, `parts` bytes for all."""
        self._scratch_bytes = max(self._scratch_bytes, scratch)
        self._parts_bytes = max(self._parts_bytes, parts)

    def buffer(self, buffer: Buffer) -> NDArray[np.float32]:
        """Return a buffer's rows, f32[n, width]. The memory of its name is allocated at the first call."""
        if buffer.name not in self._buffers:
            n_rows = -(-(self.n_outputs if buffer.outputs else self.n_batch) // TOKENS) * TOKENS
            width = -(-buffer.row_width // ROWS) * ROWS
            self._buffers[buffer.name] = aligned(4 * n_rows * width).view(np.float32).reshape(n_rows, width)
        return self._buffers[buffer.name][:, buffer.start : buffer.start + buffer.width]

    def rows(self, buffer: Buffer) -> Rows:
        """Return where the rows of a buffer are."""
        data = self.buffer(buffer)
        return Rows(data.ctypes.data, data.strides[0])

    def int8(self, buffer: Buffer) -> Rows:
        """Return where the int8 form of a buffer's rows is, in activation blocks (matmul/int_tile.py)."""
        if buffer not in self._int8:
            self._int8[buffer] = aligned(len(self.buffer(buffer)) * x_stride(buffer.width))
        return Rows(self._int8[buffer].ctypes.data, x_stride(buffer.width))

    def form(self, x: Buffer, panel: Panel) -> Buffer | Rows:
        """Return x in the form that a panel is multiplied with."""
        return self.int8(x) if isinstance(panel, IntPanel) else x

    def shared(self, name: str, n_bytes: int) -> NDArray[np.uint8]:
        """Return memory that all kernels with one name and size use in turn."""
        key = name, n_bytes
        if key not in self._shared:
            self._shared[key] = aligned(n_bytes)
        return self._shared[key]

    def shared_rows(self, name: str, n: int, stride: int) -> Rows:
        """Return where n rows of `stride` bytes in shared memory are."""
        return Rows(self.address(self.shared(name, n * stride)), stride)

    def record(self, op: Any, *kernels: TapeOp, **values: Value) -> None:
        """Append the kernels of an op. Each kernel takes the values of its fields.

        op: one of models/ops.py. The kernels work on the rows of its `out`; on those of `x` if it has no `out`.
        values: the values of fields, by name. A field without a value here takes that of the op's field of its name.
            An array stands for its address, None for 0. Buffers and Rows fill two fields, NAME and NAME_stride.

        Raises TypeError for a value that no kernel has a field for, and for a field without a value.
        """
        fields = {name for kernel in kernels for name in kernel.fields.names or ()}
        if unknown := values.keys() - fields:
            raise TypeError(f"{kernels[0].function.__name__} has no fields {sorted(unknown)}")
        given = vars(op) | values
        rows: Buffer = vars(op).get("out") or op.x
        numbers = self._common | {"rows": self.table.n_out if rows.outputs else self.table.n_tokens}
        if rows.outputs and not fields.isdisjoint(_TOKENS):
            wanted = self.table.wanted
            numbers |= {name: self.address(getattr(wanted, name)) for name in _TOKENS} | {"n_runs": wanted.n_runs}
        for name, value in given.items():
            if name not in fields:
                continue
            if isinstance(value, Buffer):
                value = self.rows(value)
            if isinstance(value, Rows) or value is None:
                numbers[name], numbers[f"{name}_stride"] = value or (0, 0)
            else:
                numbers[name] = self.address(value) if isinstance(value, np.ndarray) else value
        for kernel in kernels:
            names = kernel.fields.names or ()
            self._arguments.append(kernel.bind(**{name: numbers[name] for name in names if name in numbers}))
            self.kernels.append(kernel)

    def tune(self, tuning: Tuning) -> None:
        """Give the kernels numbers of this machine."""
        for arguments in self._arguments:
            for name in vars(tuning).keys() & set(arguments.dtype.names or ()):
                arguments[name] = getattr(tuning, name)

    def finish(self) -> NDArray[np.int64]:
        """Give the kernels their scratch memory and return their addresses and arguments, int64[n, 2]."""
        stride = -(-self._scratch_bytes // 64) * 64
        scratch, parts = self.shared("scratch", stride * self.n_threads), self.shared("parts", self._parts_bytes)
        shared = {"scratch": scratch.ctypes.data, "scratch_stride": stride, "parts": parts.ctypes.data}
        for arguments in self._arguments:
            for name in shared.keys() & set(arguments.dtype.names or ()):
                arguments[name] = shared[name]
        pairs = zip(self.kernels, self._arguments, strict=True)
        code = [(kernel.compiled.address, arguments.ctypes.data) for kernel, arguments in pairs]
        return np.array(code, np.int64).reshape(-1, 2)


class CpuProgram:
    """models.protocol.Program."""

    n_top = 0  # all columns are in memory anyway

    def __init__(self, team: Team, tape: Tape, ends: Sequence[int], result: Buffer) -> None:
        """ends: the number of kernels on the tape at the end of each part. The kernels behind them are `after`."""
        self.n_batch, self.n_outputs = tape.n_batch, tape.n_outputs
        code = tape.finish()
        *starts, end = ends
        self._parts, self._after = np.split(code[:end], starts), code[end:]
        self._last = code[starts[-1] if starts else 0 :]  # the last part with `after`
        self._team, self._tape, self._result = team, tape, tape.buffer(result)
        self._closed = False

    def run(
        self, ids: NDArray[np.int32], runs: Sequence[Run], rows: Sequence[int], part: int = 0, tops: Tops = ()
    ) -> Results:
        if part == 0:
            self._tape.table.set_tokens(ids, runs)
        return Results(self._run(self._last if len(rows) else self._parts[part], rows))

    def more(self, rows: Sequence[int]) -> NDArray[np.float32]:
        return self._run(self._after, rows)

    def _run(self, code: NDArray[np.int64], rows: Sequence[int]) -> NDArray[np.float32]:
        if self._closed:
            raise ValueError("the program is closed")
        self._tape.table.set_rows(rows)
        self._team.run(code)
        return self._result[: len(rows)]

    def to_host(self, buffer: Buffer, n_tokens: int) -> NDArray[np.float32]:
        return self._tape.buffer(buffer)[:n_tokens]

    def copy_from(self, other: "Program", source: Buffer, n_tokens: int, target: Buffer) -> None:
        self.to_host(target, n_tokens)[:] = other.to_host(source, n_tokens)

    def close(self) -> None:
        self._closed = True
