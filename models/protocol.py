"""The contract between the decoder and its backends, kernels_cpu and kernels_gpu.

A backend holds weights and caches on one device. It makes a program from lists of ops (ops.py) once. `Program.run` then
runs a whole step, for one token or for a batch of tokens. A program reads token ids and positions from its own memory.

Only type checkers read this file: a backend inherits nothing from it.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models import ops, rare_ops
from gguf_run.models.backend import CacheType, Results, Run, Tops
from gguf_run.models.operands import AttentionShape, Buffer
from gguf_run.models.ops import Cache, Experts, Squares, State, Table, Vector, Weight
from gguf_run.models.pages import PageTable

Op = (
    ops.Embed[Table]
    | ops.Matmul[Weight, Vector]
    | ops.MatmulGated[Weight, Vector]
    | ops.RmsNorm[Vector]
    | rare_ops.LayerNorm[Vector]
    | ops.Rope
    | ops.Attend[Cache, Vector]
    | ops.Gated
    | rare_ops.Xielu
    | rare_ops.Softcap
    | ops.Outputs
    | rare_ops.Moe[Experts, Vector, Squares]
    | ops.Observe[Squares]
    | rare_ops.GateRows
    | rare_ops.MatmulHeads[Weight]
    | rare_ops.Temper
    | rare_ops.AddPositions[Vector]
    | rare_ops.ShortConv[State, Vector]
    | rare_ops.DeltaRule[State, Vector]
    | rare_ops.Scan[State, Vector]
    | rare_ops.ScaleAdapters
    | rare_ops.Mix
    | rare_ops.MatchRms
    | rare_ops.Threshold
)


class Program(Protocol):
    """A step that is ready to run."""

    n_batch: int  # the most tokens of one run
    n_outputs: int  # the most result rows of one run
    n_top: int  # the most values of a Top; 0: `run` takes no Top

    def run(
        self, ids: NDArray[np.int32], runs: Sequence[Run], rows: Sequence[int], part: int = 0, tops: Tops = ()
    ) -> Results:
        """Run one part of the program. The last part runs `after` too if results are wanted.

        The parts of a step run one after the other, all with the same ids and runs.

        ids: up to n_batch tokens.
        runs: the sequences that the tokens belong to, from the first token to the last; each sequence once.
        rows: the tokens whose results are wanted, as indices of ids; at most n_outputs. Only the last part has results.
        tops: one for each row; (): all values of all rows are wanted.

        Returns f32[rows without a Top, result.width] in memory of the program, which the next run overwrites, and the
        greatest values of the others.
        """

    def more(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """Return results of other tokens of the last run. Only `after` runs again. rows: see run."""

    def to_host(self, buffer: Buffer, n_tokens: int, /) -> NDArray[np.float32]:
        """Return the first n_tokens rows of a buffer. The rows are valid until the next run."""

    def copy_from(self, other: "Program", source: Buffer, n_tokens: int, target: Buffer, /) -> None:
        """Copy the first n_tokens rows of another program's buffer `source` to `target`."""

    def close(self) -> None:
        """Free memory. The program cannot run again."""


class Backend(Protocol[Table, Weight, Vector, Cache, Experts, Squares, State]):
    """Weights and caches on one device, and programs that use them."""

    @property
    def name(self) -> str:
        """The device, the number of threads ..., as a text for people."""

    def table(self, tensor: Tensor, /) -> Table:
        """Return a matrix for Embed."""

    def weight(self, tensors: Sequence[Tensor], /) -> Weight:
        """Return a matrix for Matmul and MatmulGated: the rows of all tensors, times the tensors' `scales`.

        The rows are repacked as panels of the device. One tensor [n_head, n_out, n_in] makes the matrices of
        MatmulHeads.
        """

    def vector(self, tensors: Sequence[Tensor], /) -> Vector:
        """Return the values of all tensors, one after the other, as f32: the weight of a norm, or a bias."""

    def experts(self, tensors: Sequence[Tensor], /) -> Experts:
        """Return a layer's experts for Moe.

        tensors: gate, up and down, [n_expert, n_out, n_in] each, and their biases, [n_expert, n_out], if there are any.
        For other forms see models.experts.

        Raises UnsupportedError if gate and up have different types.
        """

    def cache(self, shape: AttentionShape, table: PageTable, kind: CacheType, /) -> Cache:
        """Return the KV cache of one layer: table.n_pages pages. `table` says which sequence uses which page."""

    def state(self, n_floats: int, n_slots: int, /) -> State:
        """Return the state of a recurrent op: n_slots slots of n_floats numbers. Run tells the slots of a sequence."""

    def squares(self, width: int, n_expert: int = 1, /) -> Squares:
        """Return sums of squares of `width` columns, for Observe, or for a Moe of n_expert experts."""

    def program(
        self,
        parts: Sequence[Sequence[Op[Table, Weight, Vector, Cache, Experts, Squares, State]]],
        after: Sequence[Op[Table, Weight, Vector, Cache, Experts, Squares, State]],
        result: Buffer,
        n_batch: int,
        n_outputs: int,
        /,
    ) -> Program:
        """Allocate the buffers of the ops, and make everything ready to run.

        parts: lists of ops. Each call of Program.run runs one list. Program.copy_from may write buffers between calls.
        after: ops that follow the last part, for the wanted rows only. The first op is Outputs. These ops write no
            buffer of the parts, so that they can run again for other rows. Empty: the program has no result rows.
        result: the buffer of `after` that Program.run returns; any buffer if `after` is empty.
        n_batch: rows of the buffers.
        n_outputs: rows of the buffers that have `outputs`.
        """

    def nbytes(self) -> dict[str, int]:
        """Return how many bytes the backend holds for each purpose: "weights", "cache", "buffers"."""


# The decoder holds backends of several kinds. Each backend gets only handles that it made itself. Functions that make
# or use handles are generic in one backend's kinds.
AnyBackend: TypeAlias = Backend[Any, Any, Any, Any, Any, Any, Any]
