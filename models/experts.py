"""The tensors of a layer's experts, in the forms that files have them."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import UnsupportedError
from gguf_run.formats.frozen import frozen
from gguf_run.formats.gguf.reader import Tensor


@frozen(eq=False)
class ExpertTensors:
    """What Backend.experts gets."""

    n_expert: int
    into: list[Tensor]  # gate and up, or one tensor with both: of each expert first the gate, then `up`; or up alone
    down: Tensor
    biases: list[Tensor]  # of into and down, [n_expert, n_out] each; []: none
    factors: NDArray[np.float32] | None  # f32[n_expert]: factors of the experts' results

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "ExpertTensors":
        """Take apart the tensors of experts: two or three, and as many biases or none.

        The factors are the `scales` of down. Those of NVFP4 stay with the tensor: they are a part of its type.
        """
        n = len(tensors) // 2 if len(tensors) > 3 else len(tensors)
        first, *others, down = tensors[:n]
        for other in others:
            if other.type != first.type:
                raise UnsupportedError(
                    f"{first.name} and {other.name} have the types {first.type.name} and {other.type.name}; "
                    "this version needs one for both"
                )
        factors = None
        if down.scales and down.type.name != "NVFP4":
            factors, down = np.array(down.scales, np.float32), replace(down, scales=())
        return cls(math.prod(down.ne[2:]), [first, *others], down, [*tensors[n:]], factors)

    @property
    def is_fused(self) -> bool:
        """Whether one tensor has gate and up."""
        return self.into[0].ne[1] == 2 * self.down.ne[0]

    @property
    def is_gated(self) -> bool:
        return self.is_fused or len(self.into) == 2
