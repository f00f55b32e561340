"""Checkpoints of Llama and of decoders with one feed-forward network in a layer."""

from dataclasses import replace

from gguf_run.runtime.convert import shared
from gguf_run.runtime.convert.layout import CheckpointLayout
from gguf_run.runtime.convert.shared import Key, Names, network

# Llama 1 to 3.x, and what copies its layer.
LLAMA_ROW = CheckpointLayout(
    "llama", {"LlamaForCausalLM": "llama", "LLaMAForCausalLM": "llama"},
    layer={**shared.LLAMA, **shared.MIXTRAL_EXPERTS, **shared.MOE}, permuted=True, rope_dim=True,
    keys=(shared.VOCAB_SIZE,),
)  # fmt: skip
UNGATED: Names = {**shared.PRE_NORMS, **shared.ATTENTION, "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
RELU2 = {"hidden_act": ("relu2",)}
GLM4: Names = {
    **shared.ATTENTION, "input_layernorm": "attn_norm", "post_self_attn_layernorm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm", "post_mlp_layernorm": "post_ffw_norm", "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
COHERE2 = {"logit_scale": 0.0625, "layer_norm_eps": 1e-5, "tie_word_embeddings": True}
COHERE2_FIXED = {
    "rotary_pct": (1.0,), "position_embedding_type": ("rope_gptj",), "use_qk_norm": (False,),
    "use_gated_activation": (True,), "use_parallel_block": (True,), "attention_bias": (False,),
    "order_of_interleaved_layers": ("local_attn_first",),
}  # fmt: skip
APERTUS_NORMS: Names = {"attention_layernorm": "attn_norm", "feedforward_layernorm": "ffn_norm"}
EVERY_4TH = {"sliding_window": 4096, "sliding_window_pattern": 4}
GRANITE_KEYS: tuple[Key, ...] = (
    shared.VOCAB_SIZE,
    ("attention.scale", "f32", ("attention_multiplier",)),
    ("embedding_scale", "f32", ("embedding_multiplier",)),
    ("residual_scale", "f32", ("residual_multiplier",)),
    ("logit_scale", "f32", ("logits_scaling",)),
)
ROWS = (
    LLAMA_ROW,
    replace(LLAMA_ROW, classes={"MistralForCausalLM": "mistral"}, windows="all", defaults={"sliding_window": 4096}),
    replace(LLAMA_ROW, classes={"MixtralForCausalLM": "mixtral"}, windows="all", defaults={"rope_theta": 1e6}),
    CheckpointLayout(
        "qwen2", {"Qwen2ForCausalLM": "qwen2"}, bias_key="", windows="last", switch=True, defaults=shared.QWEN,
    ),
    CheckpointLayout(
        "qwen3", {"Qwen3ForCausalLM": "qwen3"}, layer={**shared.LLAMA, **shared.QK_NORM}, windows="last", switch=True,
        defaults={**shared.QWEN, "head_dim": 128},
    ),
    CheckpointLayout(
        "phi3", {"Phi3ForCausalLM": "phi3"},
        layer={
            **shared.PRE_NORMS, "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output",
            "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        },
        rope_dim=True, original_context=True, bias_key="", windows="all",
        # No window is written as 0: in old GGUF files a missing key means 2047.
        defaults={"sliding_window": 0, "original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0},
        expected={"lm_head_bias": (False,)},
    ),
    CheckpointLayout(
        "smollm3", {"SmolLM3ForCausalLM": "smollm3"}, permuted=True, rope_dim=True, keys=(shared.VOCAB_SIZE,),
        windows="unrotated", switch=True, defaults={"rope_theta": 2e6, "tie_word_embeddings": True},
        expected={"no_rope_layer_interval": (4,)},
    ),
    CheckpointLayout(
        "granite", {"GraniteForCausalLM": "granite"}, permuted=True, rope_dim=True, keys=GRANITE_KEYS,
        defaults={"attention_multiplier": 1.0},
    ),
    CheckpointLayout(
        "olmo2", {"Olmo2ForCausalLM": "olmo2"},
        layer={**shared.ATTENTION, **shared.DENSE, **shared.QK_NORM, **shared.POST_NORMS}, tied_copy=True,
    ),
    CheckpointLayout(
        "stablelm", {"StableLmForCausalLM": "stablelm", "StableLMEpochForCausalLM": "stablelm_epoch"},
        layer={**shared.LLAMA, **{f"self_attn.{name}_layernorm.norms.@": f"attn_{name}_norm" for name in "qk"}},
        rope_dim=True, tied_copy=True,
        keys=(
            ("use_parallel_residual", "bool", ("use_parallel_residual",)),
            ("attention.layer_norm_epsilon", "f32", ("layer_norm_eps", "norm_eps")),  # the second: of the first files
        ),
        bias_key="use_qkv_bias", defaults={"partial_rotary_factor": 0.25},
    ),
    CheckpointLayout(
        "starcoder2", {"Starcoder2ForCausalLM": "starcoder2"},
        layer={**shared.PRE_NORMS, **shared.ATTENTION, "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
        keys=(("attention.layer_norm_epsilon", "f32", ("norm_epsilon", "layer_norm_eps", "layer_norm_epsilon")),),
        bias_key="use_bias", windows="all", defaults={"tie_word_embeddings": True},
        expected={"hidden_act": ("gelu_pytorch_tanh",), "norm_type": ("layer_norm",), "mlp_type": ("default",)},
    ),
    CheckpointLayout(
        "internlm2", {"InternLM2ForCausalLM": "internlm2"},
        model={"model.tok_embeddings": "token_embd", "model.norm": "output_norm", "output": "output"},
        layer={
            "attention_norm": "attn_norm", "attention.wqkv": ("attn_q", "attn_k", "attn_v"),
            "attention.wo": "attn_output", "ffn_norm": "ffn_norm", **network("feed_forward", words=shared.NUMBERED),
        },
        permuted=True, tied_copy=True, bias_key="bias",
    ),
    replace(
        LLAMA_ROW, arch="mistral3",
        classes={"Ministral3ForCausalLM": "ministral3", "Mistral3ForConditionalGeneration": "mistral3"},
        layer=shared.LLAMA, one_way=True, yarn_log=1.0, windows="all", defaults={"head_dim": 128},
    ),
    CheckpointLayout(
        "seed_oss", {"SeedOssForCausalLM": "seed_oss"},
        layer={**shared.LLAMA, "post_attention_layernorm": "post_attention_norm"}, defaults={"head_dim": 128},
        expected={"attention_out_bias": (False,)},
    ),
    CheckpointLayout(
        "ernie4_5", {"Ernie4_5ForCausalLM": "ernie4_5"}, keys=(shared.VOCAB_SIZE,), bias_key="use_bias",
        defaults={"head_dim": 128, "rope_theta": 5e5, "tie_word_embeddings": True, "use_bias": False},
    ),
    CheckpointLayout(
        "glm4", {"Glm4ForCausalLM": "glm4"}, layer=GLM4, rope_dim=True,
        defaults={"head_dim": 128, "partial_rotary_factor": 0.5},
    ),
    CheckpointLayout(
        "qwen3vl", {"Qwen3VLForConditionalGeneration": "qwen3_vl"}, layer={**shared.LLAMA, **shared.QK_NORM},
        one_way=True, defaults={"head_dim": 128, "rope_theta": 5e5},
    ),
    CheckpointLayout(
        "hunyuan-dense", {"HunYuanDenseV1ForCausalLM": "hunyuan_v1_dense"},
        layer={**shared.LLAMA, "self_attn.query_layernorm": "attn_q_norm", "self_attn.key_layernorm": "attn_k_norm"},
        ntk_alpha=True, expected={"use_cla": (False,), "use_rotary_pos_emb": (True,)},
    ),
    replace(LLAMA_ROW, arch="arcee", classes={"ArceeForCausalLM": "arcee"}, layer=UNGATED, expected=RELU2),
    CheckpointLayout(
        "nemotron", {"NemotronForCausalLM": "nemotron"}, layer=UNGATED, norm_offset=1.0, tied_copy=True,
        keys=(shared.VOCAB_SIZE, ("attention.layer_norm_epsilon", "f32", ("norm_eps",))), rope_dim=True,
        rope_type="none", defaults={"partial_rotary_factor": 0.5, "norm_eps": 1e-5}, expected=RELU2,
    ),
    replace(
        LLAMA_ROW, arch="apertus", classes={"ApertusForCausalLM": "apertus"},
        layer={**UNGATED, **shared.QK_NORM, **APERTUS_NORMS}, permuted=False, one_way=True,
        numbers={f"mlp.act_fn.{name}": f"xielu.{name}" for name in ("alpha_n", "alpha_p", "beta", "eps")},
        defaults={"rope_theta": 1.2e7}, expected={"hidden_act": ("xielu",), "post_norm": (False,), "qk_norm": (True,)},
    ),
    CheckpointLayout(
        "exaone4", {"Exaone4ForCausalLM": "exaone4"},
        layer={**shared.ATTENTION, **shared.DENSE, **shared.QK_NORM, **shared.POST_NORMS}, keys=(shared.VOCAB_SIZE,),
        windows="period", defaults=EVERY_4TH,
    ),
    CheckpointLayout(
        "cohere2", {"Cohere2ForCausalLM": "cohere2"}, rope_dim=True, rope_type="none",
        keys=(shared.VOCAB_SIZE, ("logit_scale", "f32", ("logit_scale",))), windows="period",
        defaults={**EVERY_4TH, **COHERE2}, expected=COHERE2_FIXED,
    ),
)  # fmt: skip
