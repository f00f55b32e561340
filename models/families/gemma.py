"""The Gemma models."""

from gguf_run.models.architectures import POST, PRE, QK, Architecture

# "P": the embedding of a token for a layer, of n_ple columns.
_PER_LAYER = {
    "per_layer_token_embd.weight": ("n_ple_all", "n_vocab"),
    "per_layer_model_proj.weight": ("n_embd", "n_ple_all"),
    "per_layer_proj_norm.weight": ("n_ple",),
    "blk.N.inp_gate.weight": ("n_embd", "n_ple"),
    "blk.N.proj.weight": ("n_ple", "n_embd"),
    "blk.N.post_norm.weight": ("n_embd", "has_ple"),
}

ENTRIES = (
    Architecture("gemma", rope_style="neox", activation="gelu", scaled_embd=True),
    Architecture(
        "gemma2",
        rope_style="neox",
        activation="gelu",
        norms=(*PRE, *POST),
        scaled_embd=True,
        n_embd_scale_n_layer=(46,),  # 27B
        attn_softcap=50.0,
        final_softcap=30.0,
        swa_period=2,
    ),
    Architecture(
        "gemma3",
        rope_style="neox",
        activation="gelu",
        norms=(*PRE, *QK, *POST),
        scaled_embd=True,
        n_embd_scale_n_layer=(62,),  # 27B
        swa_period=6,
        swa_rope_freq_base=1e4,
        swa_rope_scaled=False,
    ),
    Architecture(
        "gemma4",
        rope_style="neox",
        activation="gelu",
        norms=(*PRE, *QK, *POST),
        optional_norms=("layer_output_scale",),
        scaled_embd=True,
        attention_scale=1.0,
        v_of_k=True,
        final_softcap=30.0,
        swa_rope_freq_base=1e4,
        swa_rope_scaled=False,
        moe="maybe",
        dense_beside=True,
        step="gemma_step",
        more={
            **_PER_LAYER,
            "rope_freqs.weight": ("n_rope_freqs",),
            "blk.N.layer_output_scale.weight": ("1",),
            "blk.N.ffn_gate_inp.scale": ("n_embd", "has_experts"),
            "blk.N.pre_ffw_norm_2.weight": ("n_embd", "has_experts"),
            "blk.N.post_ffw_norm_1.weight": ("n_embd", "has_experts"),
            "blk.N.post_ffw_norm_2.weight": ("n_embd", "has_experts"),
        },
    ),
)
