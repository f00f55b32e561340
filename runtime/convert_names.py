"""Names and shapes of tensors: what a checkpoint calls them, and what a GGUF file does."""

from collections.abc import Mapping

# A module's name in the checkpoint -> the tensor's name in a GGUF file, to both of which ".weight" or ".bias" is added.
# "@": number of an expert (or head), whose tensors become one; two names: the tensor is split in two.
Names = Mapping[str, str | tuple[str, str]]

MODEL: Names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ATTENTION: Names = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
}
DENSE: Names = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
QK_NORM: Names = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
EXPERTS: Names = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.@.gate_proj": "ffn_gate_exps",
    "mlp.experts.@.up_proj": "ffn_up_exps",
    "mlp.experts.@.down_proj": "ffn_down_exps",
    "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "mlp.experts.down_proj": "ffn_down_exps",
}
LLAMA = {**ATTENTION, **DENSE}
GEMMA2 = {
    **LLAMA,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
# Sets of tensors that make a feed-forward network.
DENSE_FFN = ("ffn_gate", "ffn_up", "ffn_down")
MOE_FFN = ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")

# Ends of names of tensors that hold no weights.
IGNORED = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")
# Parts of a model for images and text, of which the text is converted.
OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")

# Shapes by GGUF name, ggml order (row length first); words are numbers of convert_metadata.sizes(), "a+b" a sum.
SHAPES: Mapping[str, tuple[str, ...]] = {
    "token_embd": ("n_embd", "n_vocab"),
    "output_norm": ("n_embd",),
    "output": ("n_embd", "n_vocab"),
    "attn_norm": ("n_embd",),
    "attn_q": ("n_embd", "n_embd_q"),
    "attn_k": ("n_embd", "n_embd_kv"),
    "attn_v": ("n_embd", "n_embd_kv"),
    "attn_qkv": ("n_embd", "n_embd_q+n_embd_kv+n_embd_kv"),
    "attn_q_norm": ("head_dim",),
    "attn_k_norm": ("head_dim",),
    "attn_sinks": ("n_head",),
    "attn_output": ("n_embd_q", "n_embd"),
    "post_attention_norm": ("n_embd",),
    "ffn_norm": ("n_embd",),
    "ffn_gate": ("n_embd", "n_ff"),
    "ffn_up": ("n_embd", "n_ff"),
    "ffn_down": ("n_ff", "n_embd"),
    "ffn_gate_inp": ("n_embd", "n_expert"),
    "ffn_gate_exps": ("n_embd", "n_ff_exp", "n_expert"),
    "ffn_up_exps": ("n_embd", "n_ff_exp", "n_expert"),
    "ffn_down_exps": ("n_ff_exp", "n_embd", "n_expert"),
    "ffn_gate_inp_shexp": ("n_embd", "one"),
    "ffn_gate_shexp": ("n_embd", "n_ff_shexp"),
    "ffn_up_shexp": ("n_embd", "n_ff_shexp"),
    "ffn_down_shexp": ("n_ff_shexp", "n_embd"),
    "post_ffw_norm": ("n_embd",),
}
# Where an architecture differs.
OWN_SHAPES: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("phi3", "ffn_up"): ("n_embd", "n_ff+n_ff"),
    ("olmo2", "attn_q_norm"): ("n_embd_q",),
    ("olmo2", "attn_k_norm"): ("n_embd_kv",),
    ("stablelm", "attn_q_norm"): ("head_dim", "n_head"),
    ("stablelm", "attn_k_norm"): ("head_dim", "n_head_kv"),
}
