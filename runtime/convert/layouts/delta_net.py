"""Checkpoints of Qwen's hybrids of Gated DeltaNet and gated attention."""

from dataclasses import replace
from typing import Any

import numpy as np

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.models.mixers.delta_net import grouped
from gguf_run.runtime.convert import shared
from gguf_run.runtime.convert.layout import CheckpointLayout
from gguf_run.runtime.convert.layouts.mixtures import EVERY_LAYER_HAS_EXPERTS, SHARED_BY_GATE
from gguf_run.runtime.convert.shared import Key, Names
from gguf_run.runtime.convert.stored.checkpoint import Config
from gguf_run.runtime.convert.stored.sources import columns, computed, rows, values


def _read(layout: CheckpointLayout, config: Config) -> tuple[CheckpointLayout, Config]:
    n, period = config.integer("num_hidden_layers"), config.integer("full_attention_interval", default=4)
    plain = ["linear_attention" if (il + 1) % period else "full_attention" for il in range(n)]
    kinds = config.get("layer_types") or plain
    if not isinstance(kinds, list) or len(kinds) != n or not {*kinds} <= {"linear_attention", "full_attention"}:
        raise config.wrong(("layer_types",), f"{n} of linear_attention or full_attention")
    n_inner = config.integer("linear_num_value_heads") * config.integer("linear_value_head_dim")
    more: dict[str, Any] = {"full_attention_interval": period, "_n_inner": n_inner}
    if config.get("intermediate_size") is None:  # all layers have experts
        more["intermediate_size"] = config.integer("moe_intermediate_size")
    if kinds != plain:
        more["_recurrent"] = [kind == "linear_attention" for kind in kinds]
        layout = replace(layout, keys=(*layout.keys, ("attention.recurrent_layers", "array[bool]", ("_recurrent",))))
    return layout, config.plus(**more)


def _edit(config: Config, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of a DeltaNet layer in GGUF's form.

    Qwen 3.5: the heads of v are in the order of the heads of k that they share. In the file they take turns.
    Qwen 3 Next: one matrix has for each head of k its rows of q, k, v and z.
    """
    base, is_grouped = name.split(".")[-2], config.get("model_type") == "qwen3_next"
    n_k, n_v = config.integer("linear_num_key_heads"), config.integer("linear_num_value_heads")
    d_k, d_v = config.integer("linear_key_head_dim"), config.integer("linear_value_head_dim")
    if base == "ssm_conv1d" and len(tensor.ne) == 3:
        tensor = values(replace(tensor, ne=(tensor.ne[0], tensor.ne[2])))
    if base == "ssm_a":
        tensor = computed(name, -np.exp(dequantize(tensor.blocks(), tensor.type)).reshape(-1), tensor.file.path)
    if is_grouped and base in ("attn_qkv", "attn_gate") and tensor.n_rows == 2 * (n_k * d_k + n_v * d_v):
        *qkv, z = grouped(n_k, (d_k, d_k, n_v // n_k * d_v, n_v // n_k * d_v))
        index = z if base == "attn_gate" else np.concatenate(qkv)
        return rows(tensor, index, (tensor.ne[0], len(index)))
    n_kept = 2 * n_k * d_k if base in ("attn_qkv", "ssm_conv1d") else 0  # rows of q and k
    width = 1 if base in ("ssm_alpha", "ssm_beta", "ssm_a", "ssm_dt") else d_v  # rows, or columns, of a head
    is_vector, n = base in ("ssm_a", "ssm_dt"), n_kept + n_v * width
    if is_grouped or base not in _BY_HEADS or n != (tensor.ne[0] if is_vector or base == "ssm_out" else tensor.n_rows):
        return tensor
    heads = np.arange(n_kept, n).reshape(n_k, n_v // n_k, width).swapaxes(0, 1).reshape(-1)
    index = np.concatenate([np.arange(n_kept), heads])
    if is_vector:
        return values(tensor, lambda x: x[:, index])
    return columns(tensor, index) if base == "ssm_out" else rows(tensor, index, tensor.ne)


_BY_HEADS = ("attn_qkv", "attn_gate", "ssm_conv1d", "ssm_alpha", "ssm_beta", "ssm_a", "ssm_dt", "ssm_out")
_PARTS = {
    "in_proj_qkv": "attn_qkv", "in_proj_z": "attn_gate", "in_proj_a": "ssm_alpha", "in_proj_b": "ssm_beta",
    "conv1d": "ssm_conv1d", "dt": "ssm_dt", "A_log": "ssm_a", "norm": "ssm_norm", "out_proj": "ssm_out",
}  # fmt: skip
_LAYER: Names = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm", **shared.ATTENTION,
    **shared.QK_NORM, **{f"linear_attn.{part}": name for part, name in _PARTS.items()},
}  # fmt: skip
_NEXT: Names = {"linear_attn.in_proj_qkvz": ("attn_qkv", "attn_gate"), "linear_attn.in_proj_ba": "ssm_ba"}
_EXPERTS: Names = {**shared.MOE, **SHARED_BY_GATE}
_KEYS: tuple[Key, ...] = (
    ("ssm.conv_kernel", "u32", ("linear_conv_kernel_dim",)),
    ("ssm.state_size", "u32", ("linear_key_head_dim",)),
    ("ssm.group_count", "u32", ("linear_num_key_heads",)),
    ("ssm.time_step_rank", "u32", ("linear_num_value_heads",)),
    ("ssm.inner_size", "u32", ("_n_inner",)),
    ("full_attention_interval", "u32", ("full_attention_interval",)),
)
_DEFAULTS = {
    "rms_norm_eps": 1e-6, "head_dim": 256, "partial_rotary_factor": 0.25, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "layer_types": None,
}  # fmt: skip
_QWEN35 = CheckpointLayout(
    "qwen35", {"Qwen3_5ForCausalLM": "qwen3_5_text", "Qwen3_5ForConditionalGeneration": "qwen3_5"},
    layer={**_LAYER, **shared.DENSE}, norm_offset=1.0, keys=_KEYS, rope_dim=True, read=_read, edit=_edit,
    defaults=_DEFAULTS,
)  # fmt: skip
ROWS = (
    _QWEN35,
    replace(
        _QWEN35, arch="qwen35moe",
        classes={"Qwen3_5MoeForCausalLM": "qwen3_5_moe_text", "Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe"},
        layer={**_LAYER, **_EXPERTS}, keys=(shared.N_EXPERT, *_KEYS),
    ),
    replace(
        _QWEN35, arch="qwen3next", classes={"Qwen3NextForCausalLM": "qwen3_next"},
        layer={**_LAYER, **_NEXT, **_EXPERTS}, whole=("attn_qkv",), keys=(shared.N_EXPERT, *_KEYS),
        defaults={**_DEFAULTS, **shared.NORM}, expected=EVERY_LAYER_HAS_EXPERTS,
    ),
)  # fmt: skip
