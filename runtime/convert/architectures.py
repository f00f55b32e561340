"""How the architectures of Hugging Face checkpoints differ, as data: one row each.

A row says where a checkpoint differs from Llama's. models/architectures.py has the other half: which tensors a layer
needs, and their shapes. The facts are those of llama.cpp's converter (2026-09): other programs expect its files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gguf_run.models.architectures import ARCHITECTURES, EXPERTS, Architecture

# A module of the checkpoint -> the tensor of the GGUF file. Both names get ".weight" or ".bias".
# "@": the number of an expert (or head); all of them become one tensor. Two names: the tensor is split in halves.
# Three names: q, k and v; the checkpoint has them together for each head of keys.
Names = Mapping[str, str | tuple[str, ...]]
# A key without the architecture's name, its type, and the names in config.json. A value that is not there is left out.
Key = tuple[str, str, tuple[str, ...]]


def _network(module: str, end: str = "", words: Sequence[str] = ("gate_proj", "up_proj", "down_proj")) -> Names:
    """Return the names of a feed-forward network, or of all experts. words: gate, up and down in the checkpoint."""
    return {f"{module}.{word}": f"ffn_{name}{end}" for name, word in zip(("gate", "up", "down"), words, strict=True)}


_MODEL: Names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ATTENTION: Names = {f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"} | {"self_attn.o_proj": "attn_output"}
_PRE_NORMS: Names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_QK_NORM: Names = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_POST_NORMS: Names = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
_GEMMA2_NORMS: Names = {**_PRE_NORMS, **_POST_NORMS, "pre_feedforward_layernorm": "ffn_norm"}
_DENSE = _network("mlp")
_FUSED_EXPERTS: Names = {
    "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "mlp.experts.down_proj": "ffn_down_exps",
}
_EXPERTS: Names = {"mlp.gate": "ffn_gate_inp", **_network("mlp.experts.@", "_exps"), **_FUSED_EXPERTS}
_NUMBERED = ("w1", "w3", "w2")
_MIXTRAL_EXPERTS: Names = {
    "block_sparse_moe.gate": "ffn_gate_inp",
    **_network("block_sparse_moe.experts.@", "_exps", _NUMBERED),
}
_LLAMA: Names = {**_PRE_NORMS, **_ATTENTION, **_DENSE}
_LLAMA_MOE: Names = {**_PRE_NORMS, **_ATTENTION, **_EXPERTS}

# Ends of names of tensors that hold no weights.
IGNORED = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")
# Parts of a model for images and text, of which only the text is converted.
OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def names_of(target: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return a value of Names as a tuple."""
    return (target,) if isinstance(target, str) else target


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
_VOCAB_SIZE: Key = ("vocab_size", "u32", ("vocab_size",))
_N_EXPERT: Key = ("expert_count", "u32", ("num_experts", "num_local_experts"))
_EXPERT_FF: Key = ("expert_feed_forward_length", "u32", ("moe_intermediate_size",))
_SHARED_FF: Key = ("expert_shared_feed_forward_length", "u32", ("shared_expert_intermediate_size",))
_CAPS: tuple[Key, ...] = (
    ("attn_logit_softcapping", "f32", ("attn_logit_softcapping",)),
    ("final_logit_softcapping", "f32", ("final_logit_softcapping",)),
)

_SILU = {"hidden_act": ("silu", "swish")}
_NORM = {"norm_topk_prob": False}
_EVERY_LAYER_HAS_EXPERTS = {"decoder_sparse_step": (1,), "mlp_only_layers": ([],)}
# The first files say "gelu" by mistake: they mean the other one. Gemma 2 and 3 have both keys.
_GEMMA_FIXED = {"hidden_activation": ("gelu_pytorch_tanh",), "hidden_act": ("gelu_pytorch_tanh", "gelu")}
_GEMMA = {"head_dim": 256, "tie_word_embeddings": True}
_QWEN = {"sliding_window": 4096, "max_window_layers": 28}
_GEMMA2 = {**_GEMMA, "sliding_window": 4096, "query_pre_attn_scalar": 256}
_GPT_OSS_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
# The first files of Gemma 3 leave out values that are the defaults of the class.
_GEMMA3 = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072}


@dataclass(frozen=True)
class CheckpointLayout:
    """One architecture of checkpoints."""

    arch: str  # general.architecture
    # Class -> model_type, as in config.json. The way back writes the first; the last if experts are optional and there.
    classes: Mapping[str, str]
    layer: Names = field(default_factory=lambda: _LLAMA)  # modules of a layer
    model: Names = field(default_factory=lambda: _MODEL)  # modules beside the layers
    bare: tuple[str, ...] = ()  # tensors without ".weight" in the checkpoint; matrices of experts are [n_in, n_out]
    permuted: bool = False  # rows of q and k come as two halves of each head; GGUF has them in pairs
    interleaved: bool = False  # a tensor with two names has their rows in turns, not one half after the other
    norm_offset: float = 0.0  # added to the weights of norms
    tied_copy: bool = False  # output.weight is written even where it is the same as token_embd.weight
    keys: tuple[Key, ...] = ()  # metadata beyond BASE_KEYS, or instead of one of them
    rope_dim: bool = False  # rope.dimension_count is written
    rope_type: str = ""  # rope.scaling.type where config.json asks for no scaling
    original_context: bool = False  # rope.scaling.original_context_length is written for every kind of scaling
    bias_key: str = "attention_bias"  # config.json: whether q, k and v have biases; "": nothing says it
    # Which layers have the window: "all", "last" (from max_window_layers on), "first" (every other one below
    # max_window_layers), "period" (all but every n-th), "unrotated"; "": this architecture has no window.
    windows: str = ""
    switch: bool = False  # the window needs use_sliding_window
    # Values that transformers assumes where config.json leaves a key out. null is no such place: it means "none".
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # Values of config.json that a GGUF file cannot tell: any other cannot be converted.
    expected: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: _SILU)

    @property
    def decoder(self) -> Architecture:
        """What this program knows of the model in a GGUF file."""
        return ARCHITECTURES[self.arch]

    def all_keys(self) -> Sequence[Key]:
        """Return BASE_KEYS, in which `keys` replaces rows, and the rest of `keys`."""
        return tuple({key[0]: key for key in (*BASE_KEYS, *self.keys)}.values())

    def required(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return the tensors of every layer, and sets of tensors of which a layer has one: its feed-forward network."""
        arch = self.decoder
        norms = [name for name in arch.norms if name not in arch.optional_norms]
        always = (*norms, *arch.qkv, "attn_output", *(("attn_sinks",) if arch.sinks else ()))
        known = dict.fromkeys(name for target in self.layer.values() for name in names_of(target))
        dense = (*arch.gate_up, "ffn_down")
        experts = tuple(name for name in known if name.endswith(("_exps", "_shexp", "_inp")))
        return always, [names for names in (dense, experts) if names and known.keys() >= set(names)]


# Llama 1 to 3.x, and what copies its layer.
_LLAMA_ROW = CheckpointLayout(
    "llama",
    {"LlamaForCausalLM": "llama", "LLaMAForCausalLM": "llama"},
    layer={**_LLAMA, **_MIXTRAL_EXPERTS, **_EXPERTS},
    permuted=True,
    rope_dim=True,
    keys=(_VOCAB_SIZE,),
)
_ROWS = (
    _LLAMA_ROW,
    replace(_LLAMA_ROW, classes={"MistralForCausalLM": "mistral"}, windows="all", defaults={"sliding_window": 4096}),
    replace(_LLAMA_ROW, classes={"MixtralForCausalLM": "mixtral"}, windows="all", defaults={"rope_theta": 1e6}),
    CheckpointLayout("qwen2", {"Qwen2ForCausalLM": "qwen2"}, bias_key="", windows="last", switch=True, defaults=_QWEN),
    CheckpointLayout(
        "qwen2moe",
        {"Qwen2MoeForCausalLM": "qwen2_moe"},
        layer={**_LLAMA_MOE, "mlp.shared_expert_gate": "ffn_gate_inp_shexp", **_network("mlp.shared_expert", "_shexp")},
        tied_copy=True,
        keys=(_N_EXPERT, _EXPERT_FF, _SHARED_FF),
        bias_key="qkv_bias",
        windows="first",
        switch=True,
        defaults={**_QWEN, **_NORM},
        expected={**_SILU, **_EVERY_LAYER_HAS_EXPERTS},
    ),
    CheckpointLayout(
        "qwen3",
        {"Qwen3ForCausalLM": "qwen3"},
        layer={**_LLAMA, **_QK_NORM},
        windows="last",
        switch=True,
        defaults={**_QWEN, "head_dim": 128},
    ),
    CheckpointLayout(
        "qwen3moe",
        {"Qwen3MoeForCausalLM": "qwen3_moe"},
        layer={**_LLAMA_MOE, **_QK_NORM},
        keys=(_N_EXPERT, _EXPERT_FF),
        windows="all",
        switch=True,
        defaults={"sliding_window": 4096, **_NORM},
        expected={**_SILU, **_EVERY_LAYER_HAS_EXPERTS},
    ),
    CheckpointLayout(
        "olmoe",
        {"OlmoeForCausalLM": "olmoe"},
        layer={**_LLAMA_MOE, **_QK_NORM},
        defaults={**_NORM, "rms_norm_eps": 1e-5},
        expected={**_SILU, "clip_qkv": (None,)},
    ),
    CheckpointLayout(
        "gemma",
        {"GemmaForCausalLM": "gemma"},
        norm_offset=1.0,
        defaults=_GEMMA,
        expected=_GEMMA_FIXED,
    ),
    CheckpointLayout(
        "gemma2",
        {"Gemma2ForCausalLM": "gemma2"},
        layer={**_LLAMA, **_GEMMA2_NORMS},
        norm_offset=1.0,
        keys=_CAPS,
        windows="period",
        defaults={**_GEMMA2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        expected=_GEMMA_FIXED,
    ),
    CheckpointLayout(
        "gemma3",
        {"Gemma3ForCausalLM": "gemma3_text", "Gemma3ForConditionalGeneration": "gemma3"},
        layer={**_LLAMA, **_GEMMA2_NORMS, **_QK_NORM},
        norm_offset=1.0,
        keys=_CAPS[1:],
        windows="period",
        defaults={**_GEMMA2, **_GEMMA3, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window_pattern": 6},
        expected={**_GEMMA_FIXED, "attn_logit_softcapping": (None,)},  # transformers does not apply it
    ),
    CheckpointLayout(
        "phi3",
        {"Phi3ForCausalLM": "phi3"},
        layer={
            **_PRE_NORMS,
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
        rope_dim=True,
        original_context=True,
        bias_key="",
        windows="all",
        # No window is written as 0: in old GGUF files a missing key means 2047.
        defaults={"sliding_window": 0, "original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0},
        expected={**_SILU, "lm_head_bias": (False,)},
    ),
    CheckpointLayout(
        "smollm3",
        {"SmolLM3ForCausalLM": "smollm3"},
        permuted=True,
        rope_dim=True,
        keys=(_VOCAB_SIZE,),
        windows="unrotated",
        switch=True,
        defaults={"rope_theta": 2e6, "tie_word_embeddings": True},
        expected={**_SILU, "no_rope_layer_interval": (4,)},
    ),
    CheckpointLayout(
        "granite",
        {"GraniteForCausalLM": "granite"},
        permuted=True,
        rope_dim=True,
        keys=(
            _VOCAB_SIZE,
            ("attention.scale", "f32", ("attention_multiplier",)),
            ("embedding_scale", "f32", ("embedding_multiplier",)),
            ("residual_scale", "f32", ("residual_multiplier",)),
            ("logit_scale", "f32", ("logits_scaling",)),
        ),
        defaults={"attention_multiplier": 1.0},
    ),
    CheckpointLayout(
        "olmo2",
        {"Olmo2ForCausalLM": "olmo2"},
        layer={**_ATTENTION, **_DENSE, **_QK_NORM, **_POST_NORMS},
        tied_copy=True,
    ),
    CheckpointLayout(
        "stablelm",
        {"StableLmForCausalLM": "stablelm", "StableLMEpochForCausalLM": "stablelm_epoch"},
        layer={**_LLAMA, **{f"self_attn.{name}_layernorm.norms.@": f"attn_{name}_norm" for name in "qk"}},
        rope_dim=True,
        tied_copy=True,
        keys=(
            ("use_parallel_residual", "bool", ("use_parallel_residual",)),
            ("attention.layer_norm_epsilon", "f32", ("layer_norm_eps", "norm_eps")),  # the second: of the first files
        ),
        bias_key="use_qkv_bias",
        defaults={"partial_rotary_factor": 0.25},
    ),
    CheckpointLayout(
        "starcoder2",
        {"Starcoder2ForCausalLM": "starcoder2"},
        layer={**_PRE_NORMS, **_ATTENTION, "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
        keys=(("attention.layer_norm_epsilon", "f32", ("norm_epsilon", "layer_norm_eps", "layer_norm_epsilon")),),
        bias_key="use_bias",
        windows="all",
        defaults={"tie_word_embeddings": True},
        expected={"hidden_act": ("gelu_pytorch_tanh",), "norm_type": ("layer_norm",), "mlp_type": ("default",)},
    ),
    CheckpointLayout(
        "internlm2",
        {"InternLM2ForCausalLM": "internlm2"},
        model={"model.tok_embeddings": "token_embd", "model.norm": "output_norm", "output": "output"},
        layer={
            "attention_norm": "attn_norm",
            "attention.wqkv": ("attn_q", "attn_k", "attn_v"),
            "attention.wo": "attn_output",
            "ffn_norm": "ffn_norm",
            **_network("feed_forward", words=_NUMBERED),
        },
        permuted=True,
        tied_copy=True,
        bias_key="bias",
    ),
    CheckpointLayout(
        "deepseek",
        {"DeepseekForCausalLM": "deepseek"},
        layer={**_LLAMA, **_EXPERTS, **_network("mlp.shared_experts", "_shexp")},
        permuted=True,
        rope_dim=True,
        rope_type="none",
        keys=(
            ("leading_dense_block_count", "u32", ("first_k_dense_replace",)),
            _VOCAB_SIZE,
            ("expert_count", "u32", ("n_routed_experts",)),
            _EXPERT_FF,
            ("expert_shared_count", "u32", ("n_shared_experts",)),
            ("expert_weights_scale", "f32", ("routed_scaling_factor",)),
        ),
        defaults={"first_k_dense_replace": 0, "routed_scaling_factor": 1.0, **_NORM},
        expected={**_SILU, "scoring_func": ("softmax",), "moe_layer_freq": (1,)},
    ),
    CheckpointLayout(
        "gpt-oss",
        {"GptOssForCausalLM": "gpt_oss"},
        layer={
            **_ATTENTION,
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "post_attention_norm",
            "self_attn.sinks": "attn_sinks",
            "mlp.router": "ffn_gate_inp",
            **_FUSED_EXPERTS,
        },
        bare=("attn_sinks", *EXPERTS),
        interleaved=True,
        tied_copy=True,
        keys=(("expert_feed_forward_length", "u32", ("intermediate_size",)),),
        windows="period",
        defaults={"rope_theta": 150000.0, "rope_parameters": _GPT_OSS_ROPE, "sliding_window": 128, "head_dim": 64},
        expected={**_SILU, "swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
    ),
)
BY_CLASS: Mapping[str, CheckpointLayout] = {name: row for row in _ROWS for name in row.classes}
BY_MODEL_TYPE: Mapping[str, CheckpointLayout] = {name: row for row in _ROWS for name in row.classes.values()}
BY_ARCH: Mapping[str, tuple[CheckpointLayout, ...]] = {
    row.arch: tuple(other for other in _ROWS if other.arch == row.arch) for row in _ROWS
}
