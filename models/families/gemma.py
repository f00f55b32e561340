"""The Gemma models."""

from dataclasses import replace

from gguf_run.models.architectures import POST, PRE, QK, Architecture

# Of models whose tokens have an embedding of n_ple columns for each layer.
_PER_LAYER = {
    "per_layer_token_embd.weight": ("n_ple*n_layer", "n_vocab"),
    "per_layer_model_proj.weight": ("n_embd", "n_ple*n_layer"),
    "per_layer_proj_norm.weight": ("n_ple",),
    "blk.N.inp_gate.weight": ("n_embd", "n_ple"),
    "blk.N.proj.weight": ("n_ple", "n_embd"),
    "blk.N.post_norm.weight": ("n_embd", "has_ple"),
}
_EXPERT_NORMS = ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2")
_STREAM_VECTORS = ("altup_router_norm", "altup_correct_scale", "laurel_post_norm")

_GEMMA = Architecture("gemma", rope_style="neox", activation="gelu", scaled_embd=True)
_GEMMA2 = replace(
    _GEMMA, name="gemma2", norms=(*PRE, *POST), n_embd_scale_n_layer=(46,),  # 27B
    attn_softcap=50.0, final_softcap=30.0, swa_period=2,
)  # fmt: skip
_GEMMA3 = replace(
    _GEMMA, name="gemma3", norms=(*PRE, *QK, *POST), n_embd_scale_n_layer=(62,),  # 27B
    swa_period=6, swa_rope_freq_base=1e4, swa_rope_scaled=False,
)  # fmt: skip
_EMBEDDING = replace(_GEMMA3, name="gemma-embedding", n_embd_scale_n_layer=(), is_causal=False)
_LATER = replace(_GEMMA3, n_embd_scale_n_layer=(), attention_scale=1.0, final_softcap=30.0, swa_period=-1)
ENTRIES = (
    _GEMMA, _GEMMA2, _GEMMA3, _EMBEDDING,
    replace(
        _LATER, name="gemma4", optional_norms=("layer_output_scale",), v_of_k=True, moe="maybe", dense_beside=True,
        step="gemma_step",
        more={
            **_PER_LAYER,
            "rope_freqs.weight": ("n_rope_freqs",),
            "blk.N.layer_output_scale.weight": ("1",),
            "blk.N.ffn_gate_inp.scale": ("n_embd", "has_experts"),
            **{f"blk.N.{name}.weight": ("n_embd", "has_experts") for name in _EXPERT_NORMS},
        },
    ),
    replace(
        _LATER, name="gemma3n", step="altup_step",
        more={
            **_PER_LAYER,
            **dict.fromkeys(("altup_proj.weight", "altup_unembd_proj.weight"), ("n_embd", "n_embd", "n_stream+-1")),
            "blk.N.altup_router.weight": ("n_embd", "n_stream"),
            "blk.N.altup_predict_coef.weight": ("n_stream", "n_stream*n_stream"),
            "blk.N.altup_correct_coef.weight": ("n_stream", "n_stream"),
            "blk.N.laurel_l.weight": ("n_embd", "n_laurel"),
            "blk.N.laurel_r.weight": ("n_laurel", "n_embd"),
            **{f"blk.N.{name}.weight": ("n_embd",) for name in _STREAM_VECTORS},
        },
    ),
)  # fmt: skip
