"""Which tensor gets which type: the mixtures of llama-quantize as a pure function of names, shapes and a few facts.

A mixture such as Q4_K_M gives most matrices one type. Sensitive matrices get more bits: the one that makes the logits,
the values of attention, the output of the feed-forward network, the first and the last layers. Source:
src/llama-quant.cpp of llama.cpp (2026-09). tests/runtime/quantize/test_rules.py compares with what that library chose.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gguf_run.formats.blocks.types import TENSOR_TYPES, TensorType, type_by_name
from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.tensors import TensorInfo
from gguf_run.models.adapters import ENDS
from gguf_run.runtime.quantize.file_types import KEEP, FileType

# The replacement for a type whose block does not divide a row. F16 replaces a type that has no replacement here.
_FALLBACK: Mapping[str, str] = {
    **{row.name: "IQ4_NL" for row in TENSOR_TYPES if row.name.startswith("IQ") and row.name != "IQ4_NL"},
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0", "Q2_0"), "Q4_0"),
    **{"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
}

# Parts of names. These matrices are small or too sensitive: they keep their type.
_KEPT = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "time_mix_first.weight",
    *(f"time_mix_{name}.weight" for name in ("w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")),
    "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight", "attn_rel_b.weight",
    ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger",
    "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
_KEPT_EXACT = ("position_embd.weight", "token_types.weight")

# (part of a name, category): the first row whose part occurs in a name decides.
_CATEGORIES = (
    ("attn_qkv.weight", "attn_v"), ("attn_kv_b.weight", "attn_v"), ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"), ("attn_q.weight", "attn_q"), ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"), ("ffn_gate", "ffn_gate"), ("ffn_down", "ffn_down"),
)  # fmt: skip


@dataclass(frozen=True)
class MixtureFacts:
    """What the rules ask of a model."""

    arch: str  # general.architecture
    n_layer: int
    n_gqa: int = 1  # heads of queries for each head of keys; 0: the model has no attention
    n_expert: int = 0
    has_imatrix: bool = False

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], n_layer: int, has_imatrix: bool) -> "MixtureFacts":
        """Read the facts from metadata. A value that is not an integer counts as missing.

        n_layer: used where the metadata has no block_count.
        """
        arch = metadata.get("general.architecture")

        def number(key: str, default: int) -> int:
            value = metadata.get(f"{arch}.{key}", default)
            if isinstance(value, np.ndarray) and value.size:
                value = value.flat[0].item()  # a value for each layer: the first counts
            return value if isinstance(value, int) else default

        n_head = number("attention.head_count", 0)
        n_head_kv = number("attention.head_count_kv", n_head)
        return cls(
            arch if isinstance(arch, str) else "",
            number("block_count", n_layer),
            n_head // n_head_kv if n_head_kv > 0 else 0,
            number("expert_count", 0),
            has_imatrix,
        )


@dataclass(frozen=True)
class Overrides:
    """What the user decides."""

    pure: bool = False  # one type for all matrices, no mixture
    leave_output: bool = False  # output.weight keeps its type
    output_type: TensorType | None = None
    token_embd_type: TensorType | None = None
    # (pattern, type): the first pattern that is found in a tensor's name counts.
    tensor_types: tuple[tuple[re.Pattern[str], TensorType], ...] = ()

    def named(self, name: str) -> TensorType | None:
        return next((type for pattern, type in self.tensor_types if pattern.search(name)), None)


@dataclass(frozen=True)
class Choice:
    """The type that a tensor gets."""

    type: TensorType
    wanted: TensorType | None = None  # the better type that the row length rules out, None: there is none
    needs_imatrix: bool = False  # without importance weights the tensor is of no use
    is_free: bool = False  # no option names a type for the tensor: allocate.py may choose another


# The conditions of the table below, for tensor i of the n tensors of its category.
_TESTS: Mapping[str, Callable[[int, int, MixtureFacts], bool]] = {
    "always": lambda i, n, facts: True,
    "more bits": lambda i, n, facts: use_more_bits(i, n),
    "first 2": lambda i, n, facts: i < 2,
    "first 4": lambda i, n, facts: i < 4,
    "first 8th": lambda i, n, facts: i < n // 8,
    "first 16th": lambda i, n, facts: i < n // 16,
    "gqa 4": lambda i, n, facts: facts.n_gqa >= 4,
    "first 8th, imatrix": lambda i, n, facts: i < n // 8 and facts.has_imatrix,
    "first 8th, no imatrix": lambda i, n, facts: i < n // 8 and not facts.has_imatrix,
}
# (category, file types, ((condition, type), ...)): the first condition that holds gives the type. If none holds, it is
# the default type of the file type.
_ROWS = (
    ("attn_v", "Q2_K", (("gqa 4", "Q4_K"), ("always", "Q3_K"))),
    ("attn_v", "Q2_K_S", (("gqa 4", "Q4_K"),)),
    ("attn_v", "Q3_K_M", (("first 2", "Q5_K"), ("always", "Q4_K"))),
    ("attn_v", "Q3_K_L", (("always", "Q5_K"),)),
    ("attn_v", "Q4_K_S", (("first 4", "Q5_K"),)),
    ("attn_v", "Q4_K_M Q5_K_M", (("more bits", "Q6_K"),)),
    ("attn_v", "IQ4_NL IQ4_XS", (("gqa 4", "Q5_K"),)),
    ("ffn_down", "Q2_K", (("always", "Q3_K"),)),
    ("ffn_down", "Q2_K_S", (("first 8th", "Q4_K"),)),
    ("ffn_down", "Q3_K_M", (("first 16th", "Q5_K"), ("always", "Q4_K"))),
    ("ffn_down", "Q3_K_L", (("always", "Q5_K"),)),
    ("ffn_down", "Q4_K_S", (("first 8th", "Q5_K"),)),
    ("ffn_down", "Q4_K_M Q5_K_M", (("more bits", "Q6_K"),)),
    ("ffn_down", "IQ4_NL IQ4_XS", (("first 8th, no imatrix", "Q5_K"),)),
    ("ffn_down", "Q4_0", (("first 8th, imatrix", "Q4_1"),)),
    ("ffn_down", "Q5_0", (("first 8th, imatrix", "Q5_1"),)),
    ("attn_output", "Q2_K", (("always", "Q3_K"),)),
    ("attn_output", "Q3_K_M", (("always", "Q4_K"),)),
    ("attn_output", "Q3_K_L", (("always", "Q5_K"),)),
)
_RULES = {(category, kind): rules for category, kinds, rules in _ROWS for kind in kinds.split()}
# Architecture -> layers of its model of 70 billion weights, whose attn_v is an eighth of attn_q and costs little. A
# llama with as many heads of keys as of queries is another model.
_LAYERS_70B: Mapping[str, int] = {"llama": 80, "qwen2": 80}
# File types that give attn_output of a model with 8 experts a Q5_K: the attention is a small part of such a file.
_EIGHT_EXPERTS_OUTPUT = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS")


def layer_order(name: str) -> tuple[int, str]:
    """Return the key by which llama.cpp sorts tensors: the layer (-1: none), then the name."""
    layer = re.match(r"blk\.(\d+)", name)
    return int(layer[1]) if layer else -1, name


def use_more_bits(i: int, n: int) -> bool:
    """Whether tensor i of n is in the first or the last eighth, or is every third one between them."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def fallback(type: TensorType, n: int) -> TensorType:
    """Return `type`, or its replacement if its block does not divide rows of n weights."""
    while n % type.block_size:
        type = type_by_name(_FALLBACK.get(type.name, "F16"))
    return type


def choose_types(
    weights: Sequence[TensorInfo], facts: MixtureFacts, kind: FileType, overrides: Overrides | None = None
) -> list[Choice]:
    """Return a choice for every tensor of a model.

    weights: all tensors, in the order of the file that is written (layer_order unless the file is split): the rules
    count tensors. GgufRunError if the name of an expert's tensor has no layer.
    """
    mixture = _Mixture(weights, facts, kind, overrides or Overrides())
    return [mixture.choice(weight) for weight in weights]


class _Mixture:
    """The choices for one model. The class counts tensors: `choice` is called once for each of them, in their order."""

    def __init__(self, weights: Sequence[TensorInfo], facts: MixtureFacts, kind: FileType, user: Overrides) -> None:
        self._facts, self._kind, self._overrides = facts, kind, user
        self._default = type_by_name(kind.default)
        self._n_attn_v = sum(_category(weight.name) == "attn_v" for weight in weights)
        self._tied = all(weight.name != "output.weight" for weight in weights)
        self._seen: Counter[str] = Counter()  # tensors of each category so far

    def choice(self, weight: TensorInfo) -> Choice:
        """Return the choice for the next tensor."""
        if self._keeps(weight):
            return Choice(weight.type)
        category = _category(weight.name)
        by_user = self._by_user(weight.name, category)
        wanted = by_user or type_by_name(self._by_rules(weight, category))
        type = fallback(wanted, weight.ne[0])
        needs = type.name == "Q2_K" and self._kind.name == "Q2_K_S" and category not in ("output", "token_embd")
        return Choice(type, None if type is wanted else wanted, needs, is_free=by_user is None)

    def _keeps(self, weight: TensorInfo) -> bool:
        """Whether the tensor keeps its type."""
        name = weight.name
        return (
            self._kind.name == "COPY"
            or (self._kind.name == KEEP.name and weight.type.name != "F32")
            or max(weight.ne[1:], default=1) == 1
            or not name.endswith(("weight", *ENDS))
            or (self._overrides.leave_output and name == "output.weight")
            or name in _KEPT_EXACT
            or any(part in name for part in _KEPT)
            or weight.type.dtype.kind == "i"
        )

    def _by_user(self, name: str, category: str) -> TensorType | None:
        """Return the type that the options or a file of floats give the tensor, None where the rules decide."""
        user, named = self._overrides, self._overrides.named(name)
        if category == "token_embd" and user.token_embd_type and not (named and name.startswith("per_layer")):
            return user.token_embd_type
        if category == "output" and user.output_type:
            return user.output_type
        if not self._default.is_quantized:
            return self._default
        return named

    def _by_rules(self, weight: TensorInfo, category: str) -> str:
        """Return the type by the rules of the file type."""
        kind = self._kind.name
        if self._overrides.pure:
            return self._kind.default
        if category == "output" or (self._tied and category == "token_embd"):
            return self._of_output(weight)
        if kind == "MXFP4_MOE":
            return "MXFP4" if len(weight.ne) > 2 and weight.ne[2] > 1 else "Q8_0"
        if category == "token_embd":
            return "Q4_K" if kind in ("TQ1_0", "TQ2_0") else self._kind.default
        if self._facts.n_expert == 8 and category in ("attn_v", "attn_k"):
            return "Q8_0"
        if self._facts.n_expert == 8 and category == "attn_output":
            return "Q5_K" if kind in _EIGHT_EXPERTS_OUTPUT else self._kind.default
        return self._of_layer(weight, category)

    def _of_output(self, weight: TensorInfo) -> str:
        """Return the type of the matrix that makes the logits."""
        if self._overrides.output_type:
            return self._overrides.output_type.name
        is_q8 = self._kind.name in ("MXFP4_MOE", "Q8_0", "FP8", "INT8") or weight.ne[0] % self._default.block_size
        return "Q8_0" if is_q8 else "Q6_K"

    def _of_layer(self, weight: TensorInfo, category: str) -> str:
        """Return the type of a layer's matrix, by its position among those of its category."""
        facts = self._facts
        n = self._n_attn_v if category == "attn_v" else facts.n_layer
        i = _layer(weight.name, n) if category == "ffn_down" and facts.n_expert > 1 else self._seen[category]
        self._seen[category] += 1
        rules = _RULES.get((category, self._kind.name), ())
        type = next((type for test, type in rules if _TESTS[test](i, n, facts)), self._kind.default)
        is_70b = facts.n_layer == _LAYERS_70B.get(facts.arch) and (facts.arch, facts.n_gqa) != ("llama", 1)
        return "Q5_K" if is_70b and category == "attn_v" and type in ("Q3_K", "Q4_K") else type


def _category(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "token_embd"
    return next((category for part, category in _CATEGORIES if part in name), "other")


def _layer(name: str, n_layer: int) -> int:
    layer, _ = layer_order(name)
    if not 0 <= layer < n_layer:
        raise GgufRunError(f'tensor "{name}" is not in a layer blk.0 to blk.{n_layer - 1}: is block_count right?')
    return layer
