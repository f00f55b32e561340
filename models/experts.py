"""The tensors of a layer's experts, in the forms that files have them. Most models have none."""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import UnsupportedError
from gguf_run.formats.frozen import frozen
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models.architectures import Architecture, Shape
from gguf_run.models.operands import Buffer
from gguf_run.models.rare_ops import Moe

# Tensors of layers with experts, as in architectures.LAYER_SHAPES.
EXPERT_SHAPES: Mapping[str, Shape] = {
    "ffn_gate_inp": ("n_embd", "n_expert"),
    "exp_probs_b": ("n_expert",),
    "ffn_gate_exps": ("n_embd", "n_ff_exp", "n_expert"),
    "ffn_up_exps": ("n_embd", "n_ff_exp", "n_expert"),
    "ffn_gate_up_exps": ("n_embd", "n_ff_exp+n_ff_exp", "n_expert"),
    "ffn_down_exps": ("n_ff_exp", "n_embd", "n_expert"),
    "ffn_gate_inp_shexp": ("n_embd",),
    "ffn_gate_shexp": ("n_embd", "n_ff_shexp"),
    "ffn_up_shexp": ("n_embd", "n_ff_shexp"),
    "ffn_down_shexp": ("n_ff_shexp", "n_embd"),
}
EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
FUSED_EXPERTS = ("ffn_gate_up_exps", "ffn_down_exps")  # gate and up in one tensor
SHARED = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")


def experts_of(arch: Architecture, block: str, tensors: Container[str]) -> tuple[str, ...]:
    """Return the tensors of a layer's experts. A file may have gate and up in one tensor. block: "blk.N."."""
    if f"{block}{FUSED_EXPERTS[0]}.weight" in tensors:
        return FUSED_EXPERTS
    return EXPERTS if arch.gated else EXPERTS[1:]


def moe_op(step: Any, il: int, x: Buffer, logits: Buffer, out: Buffer, accumulate: bool) -> Moe[Any, Any, Any]:
    """Load the experts of layer il, and return their op. step: a step.Step, which reads this file."""
    config, block = step.config, f"blk.{il}."
    names = tuple(block + name for name in experts_of(config.arch, block, step.load.tensors))
    weights = tuple(f"{name}.weight" for name in names)
    first = step.squares(weights[:-1], config.n_embd, config.n_expert)
    last = step.squares(weights[-1:], config.n_ff_exp, config.n_expert)
    squares = None if first is None or last is None else (first, last)
    experts, bias = step.load.experts(names), step.load.vector(f"{block}exp_probs_b.bias")
    return Moe(x, logits, experts, config.moe, out, squares, bias, accumulate)


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
