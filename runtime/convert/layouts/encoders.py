"""Checkpoints of encoders, which make embeddings. gemma.py has EmbeddingGemma."""

from gguf_run.runtime.convert.layout import CheckpointLayout
from gguf_run.runtime.convert.shared import Names

_EMBEDDINGS: Names = {
    "embeddings.word_embeddings": "token_embd", "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types", "embeddings.LayerNorm": "token_embd_norm",
    "emb_ln": "token_embd_norm",
}  # fmt: skip
_NOMIC_NAMES = {  # of the first files
    "n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers",
    "n_inner": "intermediate_size", "activation_function": "hidden_act", "layer_norm_epsilon": "layer_norm_eps",
    "rotary_emb_base": "rope_theta", "n_positions": "_n_positions", "max_trained_positions": "max_position_embeddings",
}  # fmt: skip
ROWS = (
    CheckpointLayout(
        "bert", {"BertModel": "bert"}, model=_EMBEDDINGS, one_way=True, bias_key="",
        layer={
            **{f"attention.self.{word}": f"attn_{word[0]}" for word in ("query", "key", "value")},
            "attention.output.dense": "attn_output", "attention.output.LayerNorm": "attn_output_norm",
            "intermediate.dense": "ffn_up", "output.dense": "ffn_down", "output.LayerNorm": "layer_output_norm",
        },
        expected={"hidden_act": ("gelu",), "position_embedding_type": ("absolute",), "is_decoder": (False,)},
    ),
    CheckpointLayout(
        "nomic-bert", {"NomicBertModel": "nomic_bert"}, model=_EMBEDDINGS, one_way=True, bias_key="",
        layer={
            "attn.Wqkv": "attn_qkv", "attn.out_proj": "attn_output", "norm1": "attn_output_norm",
            "norm2": "layer_output_norm", "mlp.fc11": "ffn_up", "mlp.fc12": "ffn_gate", "mlp.fc2": "ffn_down",
        },
        aliases=_NOMIC_NAMES, defaults={"rope_theta": 1000.0, "max_position_embeddings": 2048},
        expected={
            "hidden_act": ("silu", "swiglu"), "prenorm": (False,), "causal": (False,), "rotary_emb_fraction": (1.0,),
            "rotary_emb_interleaved": (False,), "moe_every_n_layers": (0,),
        },
    ),
)  # fmt: skip
