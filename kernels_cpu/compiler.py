"""A backend that compiles kernels ahead of their use."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.gguf.reader import Tensor
from gguf_run.kernels_cpu.backend import CpuBackend
from gguf_run.kernels_cpu.replay.op import TapeOp


class KernelCompiler(CpuBackend):
    """Compiles the kernels of its programs, from the last to the first. Weights stay empty: no program must run."""

    def __init__(self) -> None:
        super().__init__(1)

    def _store(self, groups: Sequence[list[Tensor]], n_bytes: int) -> NDArray[np.uint8]:
        """Return memory that the threads fill. groups: tensors that share panels; all groups have as many bytes."""
        data = self._arena.take(n_bytes)
        for group, to in zip(groups, data.reshape(len(groups), -1), strict=True):
            self._repack(group, to)
        self._bytes["weights"] += n_bytes
        return data

    def _repack(self, tensors: list[Tensor], to: NDArray[np.uint8]) -> None:
        pass

    def _compile(self, kernels: Sequence[TapeOp]) -> None:
        super()._compile(kernels[::-1])
