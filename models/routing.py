"""Reads how a token's experts are chosen and weighted. Only models with experts import this file."""

from collections.abc import Mapping

from gguf_run.formats.errors import UnsupportedError
from gguf_run.formats.frozen import frozen
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models.architectures import Architecture
from gguf_run.models.keys import Keys

# How the scores of experts follow from their logits. "sparsemixer" (Phi-3.5-MoE): an expert's score is its softmax over
# the experts that are not chosen yet and have almost its logit l: l - logit <= NEAR max(|logit|, l). It needs no bias.
# Kernels know a gating as its place in this tuple.
GATINGS = ("softmax", "sigmoid", "sparsemixer")
NEAR = 0.02
MIN_SUM = 1e-20  # the least sum that weights are divided by
_GATINGS = ("", "softmax", "sigmoid", "softmax")  # by expert_gating_func. The last one is of the chosen logits: norm


@frozen
class Mixture:
    """How a token's experts are chosen and weighted: by scores, which are the gating of the router's logits.

    The experts with the greatest score + bias are chosen (bias: of rare_ops.Moe). An expert's weight is its score.
    """

    n_used: int  # experts per token
    norm: bool  # whether the weights are divided by their sum
    scale: float  # factor on the weights
    activation: str  # of the gate, one of ops.ACTIVATIONS
    gating: str = "softmax"  # one of GATINGS
    n_group: int = 1  # groups of n_expert / n_group neighbours; 1: none
    n_group_used: int = 1  # experts are chosen from so many groups: those whose best experts have the greatest sum
    n_group_best: int = 2  # best experts of a group, by score + bias: 1 or 2
    weighs_input: bool = False  # the weight is a factor on what gate and up make of x, not on the expert's result


def read_mixture(
    arch: Architecture, keys: Keys, tensors: Mapping[str, Tensor], n_expert: int
) -> tuple[int, int, int, Mixture | None]:
    """Return n_expert and what read_experts returns. UnsupportedError if the architecture does not have so many."""
    if (n_expert, arch.moe) == (1, "no"):  # Hunyuan's converter writes 1
        return 0, 0, 0, None
    if not n_expert or arch.moe == "no":
        raise UnsupportedError(f"{arch.name}.expert_count is {n_expert}: this program does not have that yet")
    return n_expert, *read_experts(arch, keys, tensors, n_expert)


def read_experts(
    arch: Architecture, keys: Keys, tensors: Mapping[str, Tensor], n_expert: int
) -> tuple[int, int, Mixture]:
    """Return the widths n_ff_exp and n_ff_shexp of n_expert experts and of the shared one, and how they are mixed."""
    n_ff_exp = keys.integer("expert_feed_forward_length", 0, low=0) or keys.integer("feed_forward_length")
    n_ff_shared = keys.integer("expert_shared_count", 0, low=0, high=n_expert) * n_ff_exp
    n_ff_shexp = keys.integer("expert_shared_feed_forward_length", n_ff_shared, low=0)
    # Converters mean the key of one or of all shared experts: the tensor goes first.
    widths = (tensor.ne[1] for name, tensor in tensors.items() if name.endswith(".ffn_up_shexp.weight"))
    kind = keys.integer("expert_gating_func", 0, low=0, high=len(_GATINGS) - 1)
    gating = _GATINGS[kind] if kind and arch.gating != "sparsemixer" else arch.gating
    if not gating:
        gating = "sigmoid" if any(name.endswith(".exp_probs_b.bias") for name in tensors) else "softmax"
    n_used = keys.integer("expert_used_count", high=n_expert)
    mixture = Mixture(
        n_used=n_used,
        norm=keys.flag("expert_weights_norm", arch.expert_norm) or kind == 3,
        scale=keys.factor("expert_weights_scale"),
        activation=arch.expert_activation or arch.activation,
        gating=gating,
        **_groups(keys, n_expert, n_used),
        n_group_best=1 if gating == "softmax" else 2,
        weighs_input=arch.weighs_input,
    )
    return n_ff_exp, next(widths, n_ff_shexp), mixture


def _groups(keys: Keys, n_expert: int, n_used: int) -> dict[str, int]:
    """Return the groups that experts are chosen from; none if all groups are used."""
    n_group = keys.integer("expert_group_count", 1, low=0, high=n_expert) or 1
    n_group_used = keys.integer("expert_group_used_count", n_group, low=0, high=n_group) or n_group
    if n_group == n_group_used:
        return {}
    if n_expert % n_group or n_expert < 2 * n_group or n_used > n_group_used * (n_expert // n_group):
        allowed = f"a divisor of {n_expert} that leaves 2 experts or more for a group, and {n_used} in the groups used"
        raise keys.wrong("expert_group_count", allowed)
    return {"n_group": n_group, "n_group_used": n_group_used}
