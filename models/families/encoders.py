"""Encoders, which make embeddings: tokens see later ones too. gemma.py has gemma-embedding."""

from dataclasses import replace

from gguf_run.models.architectures import Architecture

# Norms stand behind additions, see encoder_step.py.
_POST = ("attn_output_norm", "layer_output_norm")
_NOMIC = Architecture(
    "nomic-bert", rope_style="neox", norms=_POST, output_norm="token_embd_norm", layer_norm=True, is_causal=False,
    step="encoder_step", shapes=dict.fromkeys(_POST, ("n_embd",)), more={"token_embd_norm.bias": ("n_embd",)},
)  # fmt: skip
ENTRIES = (
    _NOMIC,
    replace(
        _NOMIC, name="bert", activation="gelu_erf", gated=False, gate_up=("ffn_up",), no_rope_period=1,  # none rotates
        more={**_NOMIC.more, "position_embd.weight": ("n_embd", "n_ctx_train")},
    ),
)  # fmt: skip
