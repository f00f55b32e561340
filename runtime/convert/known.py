"""Which keys of config.json are known: a key that is neither written, nor fixed, nor harmless is told to the user."""

import warnings
from collections.abc import Iterator
from typing import Any

from gguf_run.formats.errors import UnsupportedError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.runtime.convert.layout import CheckpointLayout
from gguf_run.runtime.convert.rope import LOCAL_NAME, PART_NAMES, ROPE_NAMES, unknown_rope_names
from gguf_run.runtime.convert.shared import N_DRAFT
from gguf_run.runtime.convert.stored.checkpoint import Config

# Values of any architecture that a GGUF file cannot tell.
_FIXED: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "scale_attn_weights": (True,),
    "rotary_scaling_factor": (1.0,),
}
_MOST = 20  # names in a warning
# Sizes, which metadata.sizes reads, and flags, which tensors.py compares with the tensors.
_READ = (
    "head_dim", "intermediate_size", "n_shared_experts", "moe_intermediate_size", "shared_expert_intermediate_size",
    "vocab_size", "tie_word_embeddings", "num_experts", "num_local_experts", "no_rope_layers", "num_key_value_heads",
    "num_nextn_predict_layers", "type_vocab_size",
)  # fmt: skip
# Keys that say nothing of what is computed: names, training, how transformers runs or generates, parts for images.
_HARMLESS = (
    "max_sequence_length", "use_flash_attn", "architectures", "model_type", "auto_map", "transformers_version",
    "transformers.js_config", "torch_dtype", "dtype", "initializer_range", "pretraining_tp", "use_cache",
    "cache_implementation", "text_config", "vision_config", "mm_tokens_per_image", "attention_dropout",
    "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_softmax_in_fp32",
    "scale_attention_softmax_in_fp32", "use_flash_attention_2", "sliding_window_size", "num_heads", "num_labels",
    "residual_dropout", "embedding_dropout", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
    "aux_loss_alpha", "seq_aux", "quantization", "quantization_config", "compression_config", "unsloth_fixed",
    "unsloth_version", "is_llama_config", "attn_implementation", "max_length", "temperature", "top_k", "top_p",
    "typical_p", "do_sample", "num_beams", "num_beam_groups", "num_return_sequences", "repetition_penalty",
    "length_penalty", "diversity_penalty", "task_specific_params", "finetuning_task", "tokenizer_class", "id2label",
    "label2id", "problem_type", "return_dict", "gradient_checkpointing", "initial_context_length", "experts_per_token",
    "interpolate_factor", "full_attn_mod", "num_logits_to_keep", "chunk_size",
    "mamba_chunk_size", "mamba_ssm_cache_dtype", "use_mamba_kernels", "time_step_floor", "time_step_max",
    "time_step_min", "residual_in_fp32", "rescale_prenorm_residual", "moe_shared_expert_overlap", "expand",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "mtp_layers_block_type", "mtp_hybrid_override_pattern",
    "projector_hidden_act", "multimodal_projector_bias", "spatial_merge_size", "vision_feature_layer",
)  # fmt: skip
_TOKENS = ("_token_id", "_token_ids", "_token_index")  # ends of keys that name tokens, which a tokenizer knows


def check_keys(layout: CheckpointLayout, config: Config) -> None:
    """Refuse a value that a GGUF file cannot tell, and warn of the keys that this program does not know."""
    fixed = {**_FIXED, **layout.fixed}
    if "attn_q_norm" in {*layout.decoder.norms} - {*layout.decoder.optional_norms}:
        fixed["use_qk_norm"] = (True,)
    for key, allowed in fixed.items():
        value = config.get(key)
        if value is not None and value not in allowed:
            shown = config.wrong((key,), " or ".join(map(str, allowed)))
            raise UnsupportedError(f"{shown}: a GGUF file of a {layout.arch} model has no place for another value")
    _check_no_rope(layout, config)
    known = {*_READ, *_HARMLESS, *fixed, *layout.defaults, *_names(layout)}
    # A key that is off, empty or null asks for nothing.
    unknown = [key for key, value in config.values.items() if value and key not in known]
    unknown = [key for key in unknown if not key.startswith("_") and not key.endswith(_TOKENS)]
    types = config.get("layer_types")
    if "layer_types" in unknown and isinstance(types, list) and types.count("full_attention") == len(types):
        unknown.remove("layer_types")
    unknown += unknown_rope_names(layout, config)
    if unknown:
        names = ", ".join(map(quoted, sorted(unknown)[:_MOST]))
        what = f"if that changes what a {layout.arch} model computes, the file computes something else"
        warnings.warn(f"{config.path}: this program does not know {names}: {what}", stacklevel=3)


def _names(layout: CheckpointLayout) -> Iterator[str]:
    """Yield the names that the layout's own tables and the rotation read."""
    for _, _, names in layout.all_keys():
        yield from names
    yield from ROPE_NAMES
    yield layout.bias_key
    yield N_DRAFT
    if layout.bias_key == "attention_bias":
        yield "mlp_bias"
    if PART_NAMES[0] in layout.defaults:
        yield from PART_NAMES
    if layout.decoder.swa_rope_freq_base:
        yield LOCAL_NAME
    if "attn_q_norm" in layout.decoder.optional_norms:
        yield from ("qk_layernorm", "use_qk_norm")
    if layout.windows:
        yield from ("sliding_window", *(() if layout.windows == "all" else ("layer_types",)))
    if layout.switch:
        yield from ("use_sliding_window", "max_window_layers")


def _check_no_rope(layout: CheckpointLayout, config: Config) -> None:
    period, pattern = layout.decoder.no_rope_period, config.get("no_rope_layers")
    n = len(pattern) if isinstance(pattern, list) else 1
    if period and pattern is not None and pattern != [int((i + 1) % period > 0) for i in range(n)]:
        each = f"0 for every layer whose number is a multiple of {period}, else 1"
        raise UnsupportedError(
            f"{config.wrong(('no_rope_layers',), each)}: a GGUF file of a {layout.arch} model has no place for others"
        )
