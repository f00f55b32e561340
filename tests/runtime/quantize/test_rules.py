"""Which tensor gets which type, against what llama.cpp chose for the same names and shapes.

quantize_rules.json: "arch n_layer n_head n_head_kv n_expert tied n_embd" -> file type -> for each kind of tensor its
types in the order of the layers, from llama_quant_compute_types of llama.cpp 0.5.0.
quantize_rules_hybrid.json: "arch n_layer n_gqa n_expert" -> the layers of each kind of tensor ("name type ne"), and the
same summary by file type, of the files that llama_model_quantize writes of random checkpoints that gguf-convert made.
"""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.tensors import TensorInfo as Weight
from gguf_run.runtime.quantize.file_types import WRITABLE_FILES, file_type
from gguf_run.runtime.quantize.rules import (
    MixtureFacts,
    Overrides,
    choose_types,
    fallback,
    layer_order,
    use_more_bits,
)

F16, F32 = type_by_name("F16"), type_by_name("F32")
REFERENCE = json.loads(Path(__file__).with_name("quantize_rules.json").read_text())
HYBRID = json.loads(Path(__file__).with_name("quantize_rules_hybrid.json").read_text())


def model_weights(arch: str, n_layer: int, n_expert: int = 0, tied: bool = False, n_embd: int = 1024) -> list[Weight]:
    """All tensors of a model in llama.cpp's order."""
    e, n_ff = n_embd, 4 * n_embd
    experts = "_exps" if n_expert else ""
    per = (n_expert,) if n_expert else ()
    layer = {
        "attn_q": (e, e), "attn_k": (e, 256), "attn_v": (e, 256),
        "attn_norm": (e,), "attn_output": (e, e), f"ffn_up{experts}": (e, n_ff, *per),
        f"ffn_gate{experts}": (e, n_ff, *per), f"ffn_down{experts}": (n_ff, e, *per),
    }  # fmt: skip
    if n_expert:
        layer["ffn_gate_inp"] = e, n_expert
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (e, 1000), "output_norm.weight": (e,)}
    shapes |= {} if tied else {"output.weight": (e, 1000)}
    shapes |= {f"blk.{il}.{name}.weight": ne for il in range(n_layer) for name, ne in layer.items()}
    return [Weight(name, shapes[name], F16) for name in sorted(shapes, key=layer_order)]


def summary(weights: Sequence[Weight], types: Sequence[str]) -> str:
    """Types by kind of tensor, in the order of the layers, without the norms: "attn_v=2*Q5_K,30*Q4_K ..."."""
    kinds: dict[str, list[str]] = {}
    for weight, type in zip(weights, types, strict=True):
        if len(weight.ne) > 1:
            kinds.setdefault(re.sub(r"blk\.\d+\.|\.weight", "", weight.name), []).append(type)
    runs = {kind: [(len(list(run)), type) for type, run in itertools.groupby(types)] for kind, types in kinds.items()}
    return " ".join(
        f"{kind}=" + ",".join(f"{n}*{type}" if n > 1 else type for n, type in parts) for kind, parts in runs.items()
    )


def chosen(weights: list[Weight], facts: MixtureFacts, kind: str, **overrides: Any) -> dict[str, str]:
    choices = choose_types(weights, facts, file_type(kind), Overrides(**overrides))
    return {weight.name: choice.type.name for weight, choice in zip(weights, choices, strict=True)}


@pytest.mark.parametrize("model", REFERENCE)
def test_as_llama_cpp(model: str) -> None:
    arch, *numbers = model.split()
    n_layer, n_head, n_head_kv, n_expert, tied, n_embd = map(int, numbers)
    weights = model_weights(arch, n_layer, n_expert, bool(tied), n_embd)
    facts = MixtureFacts(arch, n_layer, n_head // n_head_kv, n_expert)
    assert set(REFERENCE[model]) == set(WRITABLE_FILES) - {"COPY", "NVFP4"}  # llama-quantize makes no NVFP4
    for kind, expected in REFERENCE[model].items():
        assert summary(weights, list(chosen(weights, facts, kind).values())) == expected, kind


@pytest.mark.parametrize("model", HYBRID)
def test_layers_of_several_kinds_as_llama_cpp(model: str) -> None:
    arch, *numbers = model.split()
    n_layer, n_gqa, n_expert = map(int, numbers)
    weights = []
    for kind, layers in HYBRID[model]["tensors"].items():
        name, type, ne = kind.split()
        for il in range(n_layer) if layers == "all" else layers:
            full = name if il < 0 else f"blk.{il}.{name}"
            weights.append(Weight(full, tuple(map(int, ne.split("x"))), type_by_name(type)))
    weights.sort(key=lambda weight: layer_order(weight.name))
    for kind, expected in HYBRID[model]["types"].items():
        types = chosen(weights, MixtureFacts(arch, n_layer, n_gqa, n_expert), kind)
        assert summary(weights, list(types.values())) == expected, kind


def test_more_bits() -> None:
    assert [i for i in range(22) if use_more_bits(i, 22)] == [0, 1, 4, 7, 10, 13, 16, 19, 20, 21]


@pytest.mark.parametrize(
    ("kind", "with_imatrix", "without"),
    [("Q4_0", "Q4_1", "Q4_0"), ("Q5_0", "Q5_1", "Q5_0"), ("IQ4_XS", "IQ4_XS", "Q5_K"), ("IQ4_NL", "IQ4_NL", "Q5_K")],
)
def test_imatrix_changes_early_ffn_down(kind: str, with_imatrix: str, without: str) -> None:
    weights = model_weights("llama", 16)
    for has_imatrix, early in ((True, with_imatrix), (False, without)):
        types = chosen(weights, MixtureFacts("llama", 16, has_imatrix=has_imatrix), kind)
        found = [types[f"blk.{il}.ffn_down.weight"] for il in (0, 1, 2, 15)]
        assert found == [early, early, kind, kind]


@pytest.mark.parametrize(
    "name",
    ["blk.0.attn_norm.weight", "blk.0.attn_v.bias", "blk.0.ffn_gate_inp.weight", "blk.0.ssm_conv1d.weight",
     "position_embd.weight", "v.patch_embd.weight", "blk.0.time_mix_w1.weight", "blk.0.attn_v.scale"],
)  # fmt: skip
def test_never_changed(name: str) -> None:
    for kind in ("Q4_K_M", "F16", "Q8_0"):
        for pure in (False, True):
            assert chosen([Weight(name, (256, 4), F32)], MixtureFacts("llama", 1), kind, pure=pure) == {name: "F32"}


def test_vectors_and_integers_keep_their_type() -> None:
    weights = [Weight("a.weight", (256, 1), F32), Weight("b.weight", (256, 4), type_by_name("I32"))]
    assert set(chosen(weights, MixtureFacts("llama", 1), "Q8_0").values()) == {"F32", "I32"}


@pytest.mark.parametrize(
    ("kind", "n", "expected"),
    [("Q2_K", 288, "Q4_0"), ("Q3_K", 288, "Q4_0"), ("Q4_K", 288, "Q5_0"), ("Q5_K", 288, "Q5_1"), ("Q6_K", 288, "Q8_0"),
     ("IQ4_XS", 288, "IQ4_NL"), ("TQ2_0", 288, "Q4_0"), ("Q4_K", 100, "F16"), ("Q8_0", 100, "F16"),
     ("IQ4_XS", 100, "F16"), ("Q4_K", 512, "Q4_K"), ("F16", 7, "F16")],
)  # fmt: skip
def test_fallback(kind: str, n: int, expected: str) -> None:
    assert fallback(type_by_name(kind), n).name == expected
    [choice] = choose_types([Weight("x.weight", (n, 2), F32)], MixtureFacts("", 1), file_type("Q8_0"), Overrides(
        tensor_types=((re.compile("x"), type_by_name(kind)),)))  # fmt: skip
    assert (choice.type.name, choice.wanted and choice.wanted.name) == (expected, None if kind == expected else kind)


def test_precedence() -> None:
    weights, facts = model_weights("llama", 16), MixtureFacts("llama", 16)
    tensor_types = ((re.compile("attn_v"), type_by_name("Q8_0")), (re.compile("."), type_by_name("Q4_1")))
    types = chosen(
        weights, facts, "Q4_K_M", output_type=F16, token_embd_type=type_by_name("Q5_0"), tensor_types=tensor_types
    )
    names = ("token_embd", "output", "blk.0.attn_v", "blk.0.ffn_down", "blk.0.attn_norm")
    assert [types[f"{name}.weight"] for name in names] == ["Q5_0", "F16", "Q8_0", "Q4_1", "F16"]
    assert set(chosen(weights, facts, "Q4_K_M", pure=True).values()) == {"Q4_K", "F16"}  # F16: the norms
    assert chosen(weights, facts, "Q4_K_M", leave_output=True)["output.weight"] == "F16"
    # Where the embeddings make the logits, --output-tensor-type is about them; mixtures of floats take no patterns.
    tied = model_weights("llama", 16, tied=True)
    assert chosen(tied, facts, "Q4_K_M", output_type=F16)["token_embd.weight"] == "F16"
    assert set(chosen(weights, facts, "BF16", tensor_types=tensor_types).values()) == {"BF16", "F16"}
    assert set(chosen(weights, facts, "COPY", output_type=F32).values()) == {"F16"}


def test_only_q2_k_s_needs_an_imatrix() -> None:
    weights = model_weights("llama", 16)
    for kind, needed in (("Q2_K_S", {"Q2_K"}), ("Q2_K", set())):
        choices = choose_types(weights, MixtureFacts("llama", 16), file_type(kind))
        assert {choice.type.name for choice in choices if choice.needs_imatrix} == needed
        assert not choices[[weight.name for weight in weights].index("token_embd.weight")].needs_imatrix


def test_layer_of_an_expert_must_exist() -> None:
    with pytest.raises(GgufRunError, match=r"blk\.7\.ffn_down_exps\.weight.*blk\.3"):
        choose_types([Weight("blk.7.ffn_down_exps.weight", (256, 4, 2), F16)], MixtureFacts("x", 4, 1, 2),
                     file_type("Q4_K_M"))  # fmt: skip


def test_facts_from_metadata() -> None:
    keys = {"general.architecture": "a", "a.block_count": 4, "a.attention.head_count": np.array([8, 8]),
            "a.attention.head_count_kv": 2, "a.expert_count": 8}  # fmt: skip
    assert MixtureFacts.from_metadata(keys, 9, True) == MixtureFacts("a", 4, 4, 8, True)
    assert MixtureFacts.from_metadata({}, 9, False) == MixtureFacts("", 9, 0, 0, False)
    assert MixtureFacts.from_metadata({"general.architecture": "a", "a.attention.head_count": 8}, 9, False).n_gqa == 1
