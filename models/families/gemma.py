"""The Gemma models."""

from gguf_run.models.architectures import POST, PRE, QK, Architecture

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
)
