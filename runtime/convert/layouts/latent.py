"""Checkpoints with latent attention."""

from dataclasses import replace
from typing import Any

import numpy as np

from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.runtime.convert import shared
from gguf_run.runtime.convert.layout import CheckpointLayout
from gguf_run.runtime.convert.shared import Names, network
from gguf_run.runtime.convert.stored.checkpoint import Config
from gguf_run.runtime.convert.stored.sources import rows, transposed

_PARTS = {
    "q_proj": "attn_q", "q_a_proj": "attn_q_a", "q_a_layernorm": "attn_q_a_norm", "q_b_proj": "attn_q_b",
    "kv_a_proj_with_mqa": "attn_kv_a_mqa", "kv_a_layernorm": "attn_kv_a_norm", "o_proj": "attn_output",
}  # fmt: skip
_LAYER: Names = {
    **shared.PRE_NORMS, **{f"self_attn.{part}": name for part, name in _PARTS.items()},
    "self_attn.kv_b_proj": ("attn_k_b", "attn_v_b"), **shared.DENSE, **shared.MOE,
    "mlp.gate.e_score_correction": "exp_probs_b", **network("mlp.shared_experts", "_shexp"),
}  # fmt: skip


def _read(layout: CheckpointLayout, config: Config) -> tuple[CheckpointLayout, Config]:
    """One head of keys, of which the rotated columns are the head in transformers; first layers without experts."""
    n_layer, kinds = config.integer("num_hidden_layers"), config.get("mlp_layer_types")
    n_dense = config.integer("first_k_dense_replace", default=0, low=0)
    if isinstance(kinds, list):
        n_dense = kinds.count("dense")
        if kinds != ["dense"] * n_dense + ["sparse"] * (n_layer - n_dense):
            raise config.wrong(("mlp_layer_types",), f"{n_layer} times dense or sparse, all dense ones first")
    n_latent, n_rot = config.integer("kv_lora_rank"), config.integer("qk_rope_head_dim")
    more: dict[str, Any] = {
        "first_k_dense_replace": n_dense,
        "_gating": 2 if config.get("scoring_func") == "sigmoid" else 1,
        "_key_length": n_latent + n_rot,
        "_head_length": config.integer("qk_nope_head_dim") + n_rot,
        "head_dim": n_rot,
        "num_key_value_heads": 1,
    }
    if isinstance(rope := config.get("rope_parameters"), dict):  # which may tell the rotated columns as a part of all
        more["rope_parameters"] = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}
    if config.get("topk_method") == "greedy":
        more |= {"n_group": 1, "topk_group": 1}
    return layout, config.plus(**more)


def _edit(config: Config, name: str, tensor: Tensor) -> Tensor:
    """Return the rows that make keys, of each head a matrix that is transposed, or those that make values."""
    base, n = name.split(".")[-2], tensor.ne[0]
    n_head, n_nope, n_value = (config.integer(key) for key in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))
    if base not in ("attn_k_b", "attn_v_b") or tensor.n_rows != n_head * (n_nope + n_value):
        return tensor
    index = np.arange(tensor.n_rows, dtype=np.int64).reshape(n_head, -1)
    if base == "attn_v_b":
        return rows(tensor, index[:, n_nope:].reshape(-1), (n, n_value, n_head))
    return transposed(rows(tensor, index[:, :n_nope].reshape(-1), (n, n_nope, n_head)))


_HEADS = {
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 0,
    "mlp_layer_types": None, "qk_head_dim": None,
}  # fmt: skip
_DEEPSEEK2 = CheckpointLayout(
    "deepseek2", {"DeepseekV2ForCausalLM": "deepseek_v2"}, layer=_LAYER, whole=("attn_k_b", "attn_v_b"),
    keys=(
        shared.VOCAB_SIZE, ("attention.q_lora_rank", "u32", ("q_lora_rank",)),
        ("attention.kv_lora_rank", "u32", ("kv_lora_rank",)), ("attention.key_length", "u32", ("_key_length",)),
        ("attention.value_length", "u32", ("kv_lora_rank",)), ("attention.key_length_mla", "u32", ("_head_length",)),
        ("attention.value_length_mla", "u32", ("v_head_dim",)), *shared.LEAD, *shared.GROUPS,
        ("expert_weights_norm", "bool", ("norm_topk_prob",)), ("expert_gating_func", "u32", ("_gating",)),
    ),
    rope_dim=True, yarn_log=0.1, read=_read, edit=_edit,
    defaults={
        **_HEADS, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_method": "greedy",
        "norm_topk_prob": False,
    },
    expected={
        "topk_method": ("greedy", "group_limited_greedy", "noaux_tc"), "scoring_func": ("softmax", "sigmoid"),
        "moe_layer_freq": (1,), "attention_bias": (False,), "mlp_bias": (False,), "rope_interleave": (True,),
    },
)  # fmt: skip
_SIGMOID = {**_HEADS, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
ROWS = (
    _DEEPSEEK2,
    replace(
        _DEEPSEEK2, classes={"DeepseekV3ForCausalLM": "deepseek_v3", "KimiK2ForCausalLM": "kimi_k2"},
        defaults={"routed_scaling_factor": 2.5, **_SIGMOID},
    ),
    replace(
        _DEEPSEEK2, classes={"Glm4MoeLiteForCausalLM": "glm4_moe_lite"},
        defaults={"routed_scaling_factor": 1.8, **_SIGMOID, "qk_nope_head_dim": 192, "v_head_dim": 256},
    ),
    replace(
        _DEEPSEEK2, arch="mistral4", classes={"Mistral4ForCausalLM": "mistral4"},
        defaults={**_HEADS, "routed_scaling_factor": 1.0, "norm_topk_prob": True, "scoring_func": "softmax"},
    ),
)  # fmt: skip
