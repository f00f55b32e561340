"""Which tensor gets which type: the mixtures of llama-quantize as a pure function of names, shapes and a few facts.

A mixture such as Q4_K_M gives most matrices one type and the sensitive ones more bits: those that make the logits, the
values of attention, the way down of the feed-forward network, first and last layers. Facts from src/llama-quant.cpp of
llama.cpp (2026-09); tests/runtime/quantize/test_rules.py compares with what that library chose.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from gguf_run.formats.blocks.types import TENSOR_TYPES, TensorType, type_by_name
from gguf_run.formats.errors import GgufRunError, OptionError, did_you_mean
from gguf_run.formats.gguf.tensors import TensorInfo


@dataclass(frozen=True)
class FileType:
    """A kind of file. id: general.file_type (COPY: that of the input); default: the type of most matrices."""

    id: int | None
    name: str
    default: str


# fmt: off
FILE_TYPES: Mapping[str, FileType] = MappingProxyType({name: FileType(id, name, default) for id, name, default in (
    (0, "F32", "F32"), (1, "F16", "F16"), (32, "BF16", "BF16"), (2, "Q4_0", "Q4_0"), (3, "Q4_1", "Q4_1"),
    (8, "Q5_0", "Q5_0"), (9, "Q5_1", "Q5_1"), (7, "Q8_0", "Q8_0"), (10, "Q2_K", "Q2_K"), (21, "Q2_K_S", "Q2_K"),
    (11, "Q3_K_S", "Q3_K"), (12, "Q3_K_M", "Q3_K"), (13, "Q3_K_L", "Q3_K"), (14, "Q4_K_S", "Q4_K"),
    (15, "Q4_K_M", "Q4_K"), (16, "Q5_K_S", "Q5_K"), (17, "Q5_K_M", "Q5_K"), (18, "Q6_K", "Q6_K"),
    (25, "IQ4_NL", "IQ4_NL"), (30, "IQ4_XS", "IQ4_XS"), (36, "TQ1_0", "TQ1_0"), (37, "TQ2_0", "TQ2_0"),
    (38, "MXFP4_MOE", "MXFP4"), (None, "COPY", "F32"),
)})
# fmt: on
KEEP = FileType(None, "KEEP", "F16")  # all as it is, but F32 matrices
ALIASES: Mapping[str, str] = MappingProxyType(
    {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}
)
# Types that can be written; the others of ggml can only be read or copied.
WRITABLE = ("F32", "F16", "BF16", *sorted({kind.default for kind in FILE_TYPES.values()} - {"F32", "F16", "BF16"}))

# What a type is replaced by in rows that its blocks do not divide; F16 where that does not fit either.
_FALLBACK: Mapping[str, str] = MappingProxyType(
    {row.name: "IQ4_NL" for row in TENSOR_TYPES if row.name.startswith("IQ") and row.name != "IQ4_NL"}
    | dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0", "Q2_0"), "Q4_0")
    | {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
)

# Matrices that are small or too sensitive: they keep the type that they have.
_KEPT = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "time_mix_first.weight",
    *(f"time_mix_{name}.weight" for name in ("w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")),
    "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight", "attn_rel_b.weight",
    ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger",
    "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
_KEPT_EXACT = ("position_embd.weight", "token_types.weight")
_KEPT_GLM5_NEXT = (
    "hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate", "indexer_compressor_ape",
    "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight", "ssm_beta.weight", "attn_kv_a_mqa.weight",
    "attn_k_b.weight", "attn_v_b.weight",
)  # fmt: skip
_Q8_GLM5_NEXT = ("attn_q_a", "attn_q_b", "nextn.eh_proj")

# The first part of a name that occurs decides the category.
_CATEGORIES = (
    ("attn_qkv.weight", "attn_v"), ("attn_kv_b.weight", "attn_v"), ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"), ("attn_q.weight", "attn_q"), ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"), ("ffn_gate", "ffn_gate"), ("ffn_down", "ffn_down"),
)  # fmt: skip


@dataclass(frozen=True)
class ModelFacts:
    """What the rules ask of a model. n_gqa: query heads for each head of keys (0: no attention)."""

    arch: str
    n_layer: int
    n_gqa: int = 1
    n_expert: int = 0
    has_imatrix: bool = False

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], n_layer: int, has_imatrix: bool) -> "ModelFacts":
        """n_layer: where the metadata does not tell. What is not an integer counts as missing."""
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
    """What the user decides. tensor_types: patterns searched for in names, the first that is found counts."""

    pure: bool = False
    leave_output: bool = False
    output_type: TensorType | None = None
    token_embd_type: TensorType | None = None
    tensor_types: tuple[tuple[re.Pattern[str], TensorType], ...] = ()

    def named(self, name: str) -> TensorType | None:
        return next((type for pattern, type in self.tensor_types if pattern.search(name)), None)


@dataclass(frozen=True)
class Choice:
    """The type a tensor gets. wanted: the one that its row length forbids, if any."""

    type: TensorType
    wanted: TensorType | None = None
    needs_imatrix: bool = False


@dataclass(frozen=True)
class _Place:
    """Where a tensor stands: number i of n of its kind. The methods are the tests of the table below."""

    i: int
    n: int
    facts: ModelFacts

    def always(self) -> bool:
        return True

    def more_bits(self) -> bool:
        return use_more_bits(self.i, self.n)

    def first_2(self) -> bool:
        return self.i < 2

    def first_4(self) -> bool:
        return self.i < 4

    def first_8th(self) -> bool:
        return self.i < self.n // 8

    def first_16th(self) -> bool:
        return self.i < self.n // 16

    def gqa_4(self) -> bool:
        return self.facts.n_gqa >= 4

    def early_with_imatrix(self) -> bool:
        return self.first_8th() and self.facts.has_imatrix

    def early_without_imatrix(self) -> bool:
        return self.first_8th() and not self.facts.has_imatrix


_Rules = Mapping[str, tuple[tuple[Callable[[_Place], bool], str], ...]]
_P = _Place
# category -> file type -> the first test that holds gives the type; else it is the default one.
_RULES: Mapping[str, _Rules] = MappingProxyType(
    {
        "attn_v": {
            "Q2_K": ((_P.gqa_4, "Q4_K"), (_P.always, "Q3_K")),
            "Q2_K_S": ((_P.gqa_4, "Q4_K"),),
            "Q3_K_M": ((_P.first_2, "Q5_K"), (_P.always, "Q4_K")),
            "Q3_K_L": ((_P.always, "Q5_K"),),
            "Q4_K_S": ((_P.first_4, "Q5_K"),),
            "Q4_K_M": ((_P.more_bits, "Q6_K"),),
            "Q5_K_M": ((_P.more_bits, "Q6_K"),),
            "IQ4_NL": ((_P.gqa_4, "Q5_K"),),
            "IQ4_XS": ((_P.gqa_4, "Q5_K"),),
        },
        "ffn_down": {
            "Q2_K": ((_P.always, "Q3_K"),),
            "Q2_K_S": ((_P.first_8th, "Q4_K"),),
            "Q3_K_M": ((_P.first_16th, "Q5_K"), (_P.always, "Q4_K")),
            "Q3_K_L": ((_P.always, "Q5_K"),),
            "Q4_K_S": ((_P.first_8th, "Q5_K"),),
            "Q4_K_M": ((_P.more_bits, "Q6_K"),),
            "Q5_K_M": ((_P.more_bits, "Q6_K"),),
            "IQ4_NL": ((_P.early_without_imatrix, "Q5_K"),),
            "IQ4_XS": ((_P.early_without_imatrix, "Q5_K"),),
            "Q4_0": ((_P.early_with_imatrix, "Q4_1"),),
            "Q5_0": ((_P.early_with_imatrix, "Q5_1"),),
        },
        "attn_output": {
            "Q2_K": ((_P.always, "Q3_K"),),
            "Q3_K_M": ((_P.always, "Q4_K"),),
            "Q3_K_L": ((_P.always, "Q5_K"),),
        },
    }
)
# Falcon's own rows of that table.
_FALCON: Mapping[str, _Rules] = MappingProxyType(
    {
        "ffn_down": {
            **_RULES["ffn_down"],
            "Q3_K_M": ((_P.first_16th, "Q5_K"), (_P.more_bits, "Q4_K")),
            "Q3_K_L": ((_P.always, "Q4_K"),),
            "Q4_K_S": (),
            "Q4_K_M": ((_P.first_16th, "Q6_K"), (_P.more_bits, "Q5_K")),
        },
        "attn_output": {"Q3_K_L": ((_P.always, "Q4_K"),)},
    }
)
# Models of 70 billion weights: their attn_v is an eighth of attn_q and costs little.
_LAYERS_70B: Mapping[str, int] = MappingProxyType({"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68})
# A model of 8 experts: its attention is a small part of the file.
_EIGHT_EXPERTS_OUTPUT = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS")


def file_type(text: str) -> FileType:
    """Return the file type of that name, alias or number. OptionError lists what is allowed."""
    name = ALIASES.get(text.upper(), text.upper())
    for kind in FILE_TYPES.values():
        if name == kind.name or (text.isdecimal() and int(text) == kind.id):
            return kind
    hint = did_you_mean(text, FILE_TYPES)
    raise OptionError(f'TYPE is "{text}": {hint}allowed are {", ".join(FILE_TYPES)}, or the number of a file type')


def writable_type(text: str, option: str) -> TensorType:
    """Return the tensor type of that name, if it can be written. OptionError names the option."""
    if text.upper() not in WRITABLE:
        raise OptionError(f'{option}: "{text}" is not a type that can be written: allowed are {", ".join(WRITABLE)}')
    return type_by_name(text)


def layer_order(name: str) -> tuple[int, str]:
    """The key by which llama.cpp sorts tensors: the layer (-1: none), then the name."""
    layer = re.match(r"blk\.(\d+)", name)
    return int(layer[1]) if layer else -1, name


def use_more_bits(i: int, n: int) -> bool:
    """Whether number i of n is in the first or last eighth, or every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def fallback(type: TensorType, n: int) -> TensorType:
    """Return `type`, or what takes its place in rows of n weights that its blocks do not divide."""
    while n % type.block_size:
        type = type_by_name(_FALLBACK.get(type.name, "F16"))
    return type


def choose_types(
    weights: Sequence[TensorInfo], facts: ModelFacts, kind: FileType, overrides: Overrides | None = None
) -> list[Choice]:
    """Return a choice for every tensor. The rules count: weights are all of the model, in the order of the file that is
    written (layer_order, if it is not split). GgufRunError if an expert's tensor does not tell its layer."""
    overrides = overrides or Overrides()
    n_attn_v = sum(_category(weight.name) == "attn_v" for weight in weights)
    tied = all(weight.name != "output.weight" for weight in weights)
    seen: Counter[str] = Counter()

    def mixture(weight: TensorInfo, category: str) -> str:
        """The type by the rules of the file type."""
        if facts.arch == "glm5-next" and _has(weight.name, _Q8_GLM5_NEXT):
            return "Q8_0"
        default = type_by_name(kind.default)
        if category == "output" or (tied and category == "token_embd"):
            if overrides.output_type:
                return overrides.output_type.name
            q8 = kind.name in ("MXFP4_MOE", "Q8_0") or facts.arch == "falcon" or weight.ne[0] % default.block_size
            return "Q8_0" if q8 else "Q6_K"
        if kind.name == "MXFP4_MOE":
            experts = len(weight.ne) > 2 and weight.ne[2] > 1
            return "MXFP4" if experts and (facts.arch != "bailingmoe3" or category.startswith("ffn_")) else "Q8_0"
        if category == "token_embd":
            return "Q4_K" if kind.name in ("TQ1_0", "TQ2_0") else kind.default
        if facts.n_expert == 8 and category in ("attn_v", "attn_k"):
            return "Q8_0"
        if facts.n_expert == 8 and category == "attn_output" and facts.arch != "falcon":
            return "Q5_K" if kind.name in _EIGHT_EXPERTS_OUTPUT else kind.default
        n = n_attn_v if category == "attn_v" else facts.n_layer
        i = _layer(weight.name, n) if category == "ffn_down" and facts.n_expert > 1 else seen[category]
        seen[category] += 1
        rules = (_FALCON if facts.arch == "falcon" else _RULES).get(category) or _RULES.get(category, {})
        place = _Place(i, n, facts)
        type = next((type for test, type in rules.get(kind.name, ()) if test(place)), kind.default)
        shared = facts.n_layer == _LAYERS_70B.get(facts.arch) and not (facts.arch == "llama" and facts.n_gqa == 1)
        return "Q5_K" if shared and category == "attn_v" and type in ("Q3_K", "Q4_K") else type

    def choose(weight: TensorInfo) -> Choice:
        as_is = kind.name == "COPY" or (kind is KEEP and weight.type.name != "F32")
        if as_is or not _may_change(weight, facts, overrides):
            return Choice(weight.type)
        category = _category(weight.name)
        manual = overrides.named(weight.name)
        default = type_by_name(kind.default)
        if (
            category == "token_embd"
            and overrides.token_embd_type
            and not (manual and weight.name == "per_layer_token_embd.weight")
        ):
            wanted = overrides.token_embd_type
        elif category == "output" and overrides.output_type:
            wanted = overrides.output_type
        elif not default.is_quantized:
            wanted = default
        elif manual:
            wanted = manual
        else:
            wanted = default if overrides.pure else type_by_name(mixture(weight, category))
        type = fallback(wanted, weight.ne[0])
        needs = type.name == "Q2_K" and kind.name == "Q2_K_S" and category not in ("output", "token_embd")
        return Choice(type, None if type is wanted else wanted, needs)

    return [choose(weight) for weight in weights]


def _may_change(weight: TensorInfo, facts: ModelFacts, overrides: Overrides) -> bool:
    name = weight.name
    return (
        max(weight.ne[1:], default=1) > 1
        and name.endswith("weight")
        and not (overrides.leave_output and name == "output.weight")
        and name not in _KEPT_EXACT
        and not _has(name, _KEPT)
        and not (facts.arch == "glm5-next" and _has(name, _KEPT_GLM5_NEXT))
        and weight.type.dtype.kind != "i"
    )


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


def _has(name: str, parts: Sequence[str]) -> bool:
    return any(part in name for part in parts)
