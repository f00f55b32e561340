"""What differs between the architectures of Hugging Face checkpoints, as data: one entry each.

Facts are those of the converter of llama.cpp (2026-09), whose files other programs expect.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf_run.runtime.convert.names import ATTENTION, DENSE_FFN, EXPERTS, GEMMA2, LLAMA, MODEL, MOE_FFN, QK_NORM, Names

# (key without the architecture's name, type, names of the value in config.json): left out where config.json has none.
Key = tuple[str, str, tuple[str, ...]]

_GEMMA_ACTIVATIONS = ("gelu_pytorch_tanh", "gelu")  # "gelu" was an error in the first files, and meant the other


@dataclass(frozen=True)
class Architecture:
    """arch: general.architecture; classes, model_types: what config.json calls it.

    layer: names of what is in a layer; model: of what is beside the layers. required: the tensors that every layer has;
    ffn: sets of tensors of which a layer has one. permuted: rows of q and k are put in pairs (unpermuted).
    grouped_qkv: attn_qkv has q, k and v of each group of heads together, and is taken apart.
    norm_offset: is added to the weights of norms. interleaved, transposed: how gate_up_proj of the experts lies.
    keys: metadata beyond BASE_KEYS. defaults: values that old files of config.json leave out. expected: values that a
    GGUF file cannot tell: a config.json with another one cannot be converted; "=key" is another key's value.
    swa_period: every swa_period-th layer sees all positions (0: the window, if any, is not for this program to say).
    rope_dim: rope.dimension_count is written. rope_type: rope.scaling.type where config.json asks for no scaling.
    tied_copy: programs want output.weight even where it is the same as token_embd.weight.
    """

    arch: str
    classes: tuple[str, ...]
    model_types: tuple[str, ...]
    layer: Names = field(default_factory=lambda: LLAMA)
    model: Names = field(default_factory=lambda: MODEL)
    required: tuple[str, ...] = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm")
    ffn: tuple[tuple[str, ...], ...] = (DENSE_FFN,)
    permuted: bool = False
    grouped_qkv: bool = False
    norm_offset: float = 0.0
    interleaved: bool = False
    transposed: bool = False
    swa_period: int = 0
    rope_dim: bool = False
    rope_type: str = ""
    tied_copy: bool = False
    keys: tuple[Key, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    expected: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: {"hidden_act": ("silu", "swish")})


# Every architecture's, in the order of llama.cpp's converter; those of rope stand in convert_metadata.py.
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
_WINDOW: Key = ("attention.sliding_window", "u32", ("sliding_window",))
_EXPERT_FF: Key = ("expert_feed_forward_length", "u32", ("moe_intermediate_size",))
_FINAL_CAP: Key = ("final_logit_softcapping", "f32", ("final_logit_softcapping",))

_ENTRIES = (
    # Llama 1 to 3.x, Mistral, Mixtral, and what copies their layer.
    Architecture(
        "llama",
        ("LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"),
        ("llama", "mistral", "mixtral"),
        layer={
            **LLAMA,
            "block_sparse_moe.gate": "ffn_gate_inp",
            "block_sparse_moe.experts.@.w1": "ffn_gate_exps",
            "block_sparse_moe.experts.@.w3": "ffn_up_exps",
            "block_sparse_moe.experts.@.w2": "ffn_down_exps",
            **EXPERTS,
        },
        ffn=(DENSE_FFN, MOE_FFN),
        permuted=True,
        rope_dim=True,
        keys=(_VOCAB_SIZE,),
    ),
    Architecture("qwen2", ("Qwen2ForCausalLM",), ("qwen2",)),
    Architecture(
        "qwen2moe",
        ("Qwen2MoeForCausalLM",),
        ("qwen2_moe",),
        layer={
            **LLAMA,
            **EXPERTS,
            "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
            "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
            "mlp.shared_expert.up_proj": "ffn_up_shexp",
            "mlp.shared_expert.down_proj": "ffn_down_shexp",
        },
        ffn=((*MOE_FFN, "ffn_gate_inp_shexp", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"),),
        tied_copy=True,
        keys=(_EXPERT_FF, ("expert_shared_feed_forward_length", "u32", ("shared_expert_intermediate_size",))),
        expected={"hidden_act": ("silu",), "norm_topk_prob": (False,)},
    ),
    Architecture("qwen3", ("Qwen3ForCausalLM",), ("qwen3",), layer={**LLAMA, **QK_NORM}),
    Architecture(
        "qwen3moe",
        ("Qwen3MoeForCausalLM",),
        ("qwen3_moe",),
        layer={**ATTENTION, **QK_NORM, **EXPERTS},
        ffn=(MOE_FFN,),
        keys=(_EXPERT_FF,),
        expected={"hidden_act": ("silu",), "norm_topk_prob": (True,)},
    ),
    Architecture(
        "olmoe",
        ("OlmoeForCausalLM",),
        ("olmoe",),
        layer={**LLAMA, **QK_NORM, **EXPERTS},
        ffn=(MOE_FFN,),
        expected={"hidden_act": ("silu",), "norm_topk_prob": (False,), "clip_qkv": (None,)},
    ),
    Architecture(
        "gemma",
        ("GemmaForCausalLM",),
        ("gemma",),
        norm_offset=1.0,
        defaults={"head_dim": 256, "tie_word_embeddings": True},
        expected={"hidden_act": _GEMMA_ACTIVATIONS},
    ),
    Architecture(
        "gemma2",
        ("Gemma2ForCausalLM",),
        ("gemma2",),
        layer=GEMMA2,
        required=(
            "attn_norm",
            "attn_q",
            "attn_k",
            "attn_v",
            "attn_output",
            "post_attention_norm",
            "ffn_norm",
            "post_ffw_norm",
        ),
        norm_offset=1.0,
        swa_period=2,
        keys=(("attn_logit_softcapping", "f32", ("attn_logit_softcapping",)), _FINAL_CAP, _WINDOW),
        defaults={"head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096},
        expected={"hidden_activation": _GEMMA_ACTIVATIONS, "query_pre_attn_scalar": ("=head_dim", 144)},
    ),
    Architecture(
        "gemma3",
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        ("gemma3_text", "gemma3"),
        layer={**GEMMA2, **QK_NORM},
        required=(
            "attn_norm",
            "attn_q",
            "attn_k",
            "attn_v",
            "attn_output",
            "attn_q_norm",
            "attn_k_norm",
            "post_attention_norm",
            "ffn_norm",
            "post_ffw_norm",
        ),
        norm_offset=1.0,
        swa_period=6,
        keys=(_FINAL_CAP, _WINDOW),
        # The first configs leave out what is as in the class.
        defaults={
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        },
        expected={"hidden_activation": _GEMMA_ACTIVATIONS, "query_pre_attn_scalar": ("=head_dim", 168)},
    ),
    Architecture(
        "phi3",
        ("Phi3ForCausalLM",),
        ("phi3",),
        layer={
            **ATTENTION,
            "self_attn.qkv_proj": "attn_qkv",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
        required=("attn_norm", "attn_qkv", "attn_output", "ffn_norm"),
        ffn=(("ffn_up", "ffn_down"),),
        rope_dim=True,
        # 0: that there is none is said too, in old files a missing key meant 2047.
        keys=(_WINDOW,),
        defaults={"sliding_window": 0},
    ),
    Architecture(
        "smollm3",
        ("SmolLM3ForCausalLM",),
        ("smollm3",),
        permuted=True,
        rope_dim=True,
        keys=(_VOCAB_SIZE,),
        expected={"hidden_act": ("silu",), "no_rope_layer_interval": (4,), "use_sliding_window": (False,)},
    ),
    Architecture(
        "granite",
        ("GraniteForCausalLM",),
        ("granite",),
        permuted=True,
        rope_dim=True,
        keys=(
            _VOCAB_SIZE,
            ("attention.scale", "f32", ("attention_multiplier",)),
            ("embedding_scale", "f32", ("embedding_multiplier",)),
            ("residual_scale", "f32", ("residual_multiplier",)),
            ("logit_scale", "f32", ("logits_scaling",)),
        ),
    ),
    Architecture(
        "olmo2",
        ("Olmo2ForCausalLM",),
        ("olmo2",),
        layer={
            **LLAMA,
            **QK_NORM,
            "post_attention_layernorm": "post_attention_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        },
        required=(
            "attn_q",
            "attn_k",
            "attn_v",
            "attn_output",
            "attn_q_norm",
            "attn_k_norm",
            "post_attention_norm",
            "post_ffw_norm",
        ),
        tied_copy=True,
    ),
    Architecture(
        "stablelm",
        ("StableLmForCausalLM", "StableLMEpochForCausalLM"),
        ("stablelm", "stablelm_epoch"),
        rope_dim=True,
        layer={
            **LLAMA,
            "self_attn.q_layernorm.norms.@": "attn_q_norm",
            "self_attn.k_layernorm.norms.@": "attn_k_norm",
        },
        required=("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"),
        tied_copy=True,
        keys=(("use_parallel_residual", "bool", ("use_parallel_residual",)),),
        defaults={"partial_rotary_factor": 0.25},
    ),
    Architecture(
        "starcoder2",
        ("Starcoder2ForCausalLM",),
        ("starcoder2",),
        layer={**ATTENTION, "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
        ffn=(("ffn_up", "ffn_down"),),
        expected={"hidden_act": ("gelu_pytorch_tanh",)},
    ),
    Architecture(
        "internlm2",
        ("InternLM2ForCausalLM",),
        ("internlm2",),
        model={"model.tok_embeddings": "token_embd", "model.norm": "output_norm", "output": "output"},
        layer={
            "attention_norm": "attn_norm",
            "attention.wqkv": "attn_qkv",
            "attention.wo": "attn_output",
            "ffn_norm": "ffn_norm",
            "feed_forward.w1": "ffn_gate",
            "feed_forward.w3": "ffn_up",
            "feed_forward.w2": "ffn_down",
        },
        permuted=True,
        grouped_qkv=True,
        tied_copy=True,
    ),
    Architecture(
        "deepseek",
        ("DeepseekForCausalLM",),
        ("deepseek",),
        layer={
            **LLAMA,
            **EXPERTS,
            "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
            "mlp.shared_experts.up_proj": "ffn_up_shexp",
            "mlp.shared_experts.down_proj": "ffn_down_shexp",
        },
        ffn=(DENSE_FFN, (*MOE_FFN, "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")),
        permuted=True,
        rope_dim=True,
        rope_type="none",
        keys=(
            ("leading_dense_block_count", "u32", ("first_k_dense_replace",)),
            _VOCAB_SIZE,
            _EXPERT_FF,
            ("expert_shared_count", "u32", ("n_shared_experts",)),
            ("expert_weights_scale", "f32", ("routed_scaling_factor",)),
        ),
        defaults={"first_k_dense_replace": 0, "routed_scaling_factor": 1.0},
        expected={"hidden_act": ("silu",), "norm_topk_prob": (False,), "scoring_func": ("softmax",)},
    ),
    Architecture(
        "gpt-oss",
        ("GptOssForCausalLM",),
        ("gpt_oss",),
        layer={
            **ATTENTION,
            "post_attention_layernorm": "post_attention_norm",
            "self_attn.sinks": "attn_sinks",
            "mlp.router": "ffn_gate_inp",
            "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
            "mlp.experts.down_proj": "ffn_down_exps",
        },
        required=("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "attn_sinks", "post_attention_norm"),
        ffn=(MOE_FFN,),
        interleaved=True,
        transposed=True,
        swa_period=2,
        tied_copy=True,
        keys=(_WINDOW, ("expert_feed_forward_length", "u32", ("intermediate_size",))),
    ),
)
ARCHITECTURES: Mapping[str, Architecture] = {name: entry for entry in _ENTRIES for name in entry.classes}
MODEL_TYPES: Mapping[str, Architecture] = {name: entry for entry in _ENTRIES for name in entry.model_types}
