"""Names of tensors: what a checkpoint calls them, and what a GGUF file does; models/architectures.py has the shapes."""

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
