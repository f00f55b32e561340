"""The names of tensors, keys and values that several rows of the table of checkpoints share."""

from collections.abc import Mapping, Sequence

# A module of the checkpoint -> the tensor of the GGUF file. Both names get ".weight" or ".bias".
# "@": the number of an expert (or head); all of them become one tensor. Two names: the tensor is split in halves.
# Three names: q, k and v; the checkpoint has them together for each head of keys. A name with ".scale" is whole.
Names = Mapping[str, str | tuple[str, ...]]
# A key without the architecture's name, its type, and the names in config.json. A value that is not there is left out.
Key = tuple[str, str, tuple[str, ...]]


def network(module: str, end: str = "", words: Sequence[str] = ("gate_proj", "up_proj", "down_proj")) -> Names:
    """Return the names of a feed-forward network, or of all experts. words: gate, up and down in the checkpoint."""
    return {f"{module}.{word}": f"ffn_{name}{end}" for name, word in zip(("gate", "up", "down"), words, strict=True)}


MODEL: Names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ATTENTION: Names = {f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"} | {"self_attn.o_proj": "attn_output"}
PRE_NORMS: Names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
QK_NORM: Names = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
POST_NORMS: Names = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
DENSE = network("mlp")
FUSED_EXPERTS: Names = {
    "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "mlp.experts.down_proj": "ffn_down_exps",
}
MOE: Names = {"mlp.gate": "ffn_gate_inp", **network("mlp.experts.@", "_exps"), **FUSED_EXPERTS}
NUMBERED = ("w1", "w3", "w2")
MIXTRAL_EXPERTS: Names = {
    "block_sparse_moe.gate": "ffn_gate_inp",
    **network("block_sparse_moe.experts.@", "_exps", NUMBERED),
}
LLAMA: Names = {**PRE_NORMS, **ATTENTION, **DENSE}
LLAMA_MOE: Names = {**PRE_NORMS, **ATTENTION, **MOE}
# Ends of names of tensors that hold no weights.
IGNORED = (
    ".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq", "embeddings.position_ids",
    "pooler.dense.weight", "pooler.dense.bias",
)  # fmt: skip
# Parts of a model for images and text, of which only the text is converted.
_OTHERS = (
    "vision_tower", "vision_model", "multi_modal_projector", "visual", "audio_tower", "embed_vision", "embed_audio",
    "mtp",
)  # fmt: skip
N_DRAFT, MOST_DRAFTS = "num_nextn_predict_layers", 16  # config.json: layers behind the last one that draft tokens
OTHER_PARTS = tuple(f"{prefix}{part}." for prefix in ("", "model.") for part in _OTHERS)


def names_of(target: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return a value of Names as a tuple."""
    return (target,) if isinstance(target, str) else target


# Of decoders whose first layers are dense.
LEAD: tuple[Key, ...] = (
    ("leading_dense_block_count", "u32", ("first_k_dense_replace",)),
    ("expert_count", "u32", ("n_routed_experts", "num_experts")),
    ("expert_weights_scale", "f32", ("routed_scaling_factor",)),
)
GROUPS: tuple[Key, ...] = (
    ("expert_group_count", "u32", ("n_group",)),
    ("expert_group_used_count", "u32", ("topk_group",)),
)
# Keys that every architecture has, in the order of llama.cpp's converter. metadata.py adds those of the rotation.
BASE_KEYS: tuple[Key, ...] = (
    ("block_count", "u32", ("num_hidden_layers",)),
    ("context_length", "u32", ("max_position_embeddings",)),
    ("embedding_length", "u32", ("hidden_size",)),
    ("feed_forward_length", "u32", ("intermediate_size",)),
    ("attention.head_count", "u32", ("num_attention_heads",)),
    ("attention.head_count_kv", "u32", ("num_key_value_heads",)),
    ("attention.layer_norm_rms_epsilon", "f32", ("rms_norm_eps",)),
    ("attention.layer_norm_epsilon", "f32", ("layer_norm_eps", "norm_epsilon")),
    ("expert_count", "u32", ("num_local_experts", "num_experts", "n_routed_experts")),
    ("expert_used_count", "u32", ("num_experts_per_tok",)),
)
# Of decoders with experts, beside those.
EXPERT_KEYS: tuple[Key, ...] = (
    ("expert_feed_forward_length", "u32", ("moe_intermediate_size",)),
    ("expert_shared_feed_forward_length", "u32", ("shared_expert_intermediate_size",)),
    ("expert_shared_count", "u32", ("n_shared_experts",)),
)
VOCAB_SIZE: Key = ("vocab_size", "u32", ("vocab_size",))
# Of classes that know no other names.
N_EXPERT: Key = ("expert_count", "u32", ("num_experts", "num_local_experts"))
NORM = {"norm_topk_prob": False}
QWEN = {"sliding_window": 4096, "max_window_layers": 28}
