"""The table of architectures, and the shapes of their tensors.

An entry lists what differs from `llama`. The facts come from llama.cpp (src/models/*.cpp), whose converter writes the
files. A new architecture is a new entry if step.py can build its layers.
"""

from collections.abc import Mapping
from dataclasses import field

from gguf_run.formats.frozen import frozen

Shape = tuple[str, ...]


@frozen
class Architecture:
    """One value of `general.architecture`. The defaults are those of llama."""

    name: str
    rope_style: str = "norm"  # see operands.Rotation
    activation: str = "silu"  # of the ffn, see ops.Gated
    gated: bool = True  # the ffn has a gate
    qkv: tuple[str, ...] = ("attn_q", "attn_k", "attn_v")  # tensors whose rows make q, k and v, in this order
    gate_up: tuple[str, ...] = ("ffn_gate", "ffn_up")  # tensors whose rows make gate and up
    # Names of norms. attn_norm and `ffn_norm` come before attention and ffn, attn_q_norm and attn_k_norm before the
    # rotation. post_attention_norm and post_ffw_norm norm a result before it is added to the residual stream.
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")
    # Norms that a file may leave out. Without ffn_norm, attention and ffn read the same normed values.
    optional_norms: tuple[str, ...] = ()
    ffn_norm: str = "ffn_norm"  # name of the norm before the ffn
    layer_norm: bool = False  # norms subtract the mean and have biases
    sinks: bool = False  # attention has sinks
    no_rope_period: int = 0  # every n-th layer does not rotate; 0: all rotate
    scaled_embd: bool = False  # embeddings are multiplied by sqrt(n_embd)
    n_embd_scale_n_layer: tuple[int, ...] = ()  # with one of these n_layer, q.k is scaled by 1/sqrt(n_embd/n_head)
    attn_softcap: float = 0.0  # softcap of attention's scores, unless the file has one; 0: none
    final_softcap: float = 0.0  # softcap of the logits, unless the file has one; 0: none
    swa_period: int = 0  # in a file with a window, every n-th layer sees all positions; 0: none does
    swa_rope_freq_base: float = 0.0  # rope base of layers with a window, unless the file has one; 0: as other layers
    swa_rope_scaled: bool = True  # the rope scaling applies to layers with a window too
    yarn_truncate: bool = True  # YaRN's ramp begins and ends at whole pairs; a key in the file goes first
    moe: str = "no"  # whether layers have experts: "no", "yes", or "maybe" (the file tells)
    expert_norm: bool = True  # see operands.Mixture.norm; a key in the file goes first
    expert_activation: str = ""  # activation of the experts; "": the same as `activation`
    shared_gate: bool = False  # a gate weights the result of the shared expert
    shapes: Mapping[str, Shape] = field(default_factory=dict)  # shapes that differ from LAYER_SHAPES

    @property
    def norm_per_head(self) -> bool:
        """Whether attn_q_norm and attn_k_norm norm each head by itself. Otherwise they norm the whole row."""
        return {**LAYER_SHAPES, **self.shapes}["attn_q_norm"][0] == "head_dim"


_PRE = ("attn_norm", "ffn_norm")
_QK = ("attn_q_norm", "attn_k_norm")
_POST = ("post_attention_norm", "post_ffw_norm")
_WHOLE_ROW = {"attn_q_norm": ("n_embd_q",), "attn_k_norm": ("n_embd_kv",)}

_ENTRIES = (
    # Llama 1 to 3.x, Mistral, Mixtral, and most models that copy their layer (SmolLM, TinyLlama, Yi ...).
    Architecture("llama", moe="maybe"),
    Architecture("mistral3", moe="maybe"),
    Architecture("smollm3", no_rope_period=4),
    Architecture("internlm2"),
    Architecture("granite"),
    Architecture("granitemoe", moe="yes"),
    Architecture("qwen2", rope_style="neox"),
    Architecture("qwen2moe", rope_style="neox", moe="yes", expert_norm=False, shared_gate=True),
    Architecture("qwen3", rope_style="neox", norms=(*_PRE, *_QK)),
    Architecture("qwen3moe", rope_style="neox", norms=(*_PRE, *_QK), moe="yes"),
    Architecture("deepseek", moe="yes", expert_norm=False),
    Architecture(
        "phi3",
        rope_style="neox",
        qkv=("attn_qkv",),
        gate_up=("ffn_up",),
        shapes={"ffn_up": ("n_embd", "n_ff+n_ff")},
    ),
    Architecture("starcoder2", rope_style="neox", activation="gelu", gated=False, gate_up=("ffn_up",), layer_norm=True),
    Architecture(
        "stablelm",
        rope_style="neox",
        norms=(*_PRE, *_QK),
        optional_norms=("ffn_norm", *_QK),  # 12B has q's and k's, and no ffn_norm
        layer_norm=True,
        shapes={"attn_q_norm": ("head_dim", "n_head"), "attn_k_norm": ("head_dim", "n_head_kv")},
    ),
    Architecture(
        "olmo2",  # and OLMo 3, which has windows
        rope_style="neox",
        norms=(*_QK, *_POST),
        swa_period=4,
        swa_rope_scaled=False,
        shapes=_WHOLE_ROW,
    ),
    Architecture("olmoe", rope_style="neox", norms=(*_PRE, *_QK), moe="yes", expert_norm=False, shapes=_WHOLE_ROW),
    Architecture("gemma", rope_style="neox", activation="gelu", scaled_embd=True),
    Architecture(
        "gemma2",
        rope_style="neox",
        activation="gelu",
        norms=(*_PRE, *_POST),
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
        norms=(*_PRE, *_QK, *_POST),
        scaled_embd=True,
        n_embd_scale_n_layer=(62,),  # 27B
        swa_period=6,
        swa_rope_freq_base=1e4,
        swa_rope_scaled=False,
    ),
    Architecture(
        "gpt-oss",
        rope_style="neox",
        norms=("attn_norm", "post_attention_norm"),
        ffn_norm="post_attention_norm",
        sinks=True,
        swa_period=2,
        yarn_truncate=False,
        moe="yes",
        expert_activation="swiglu_oai",
    ),
)
ARCHITECTURES: Mapping[str, Architecture] = {entry.name: entry for entry in _ENTRIES}

# Tensors by name, ggml order: ne[0] (row length) first. A word is a field of ModelConfig, "a+b" the sum of two.
MODEL_SHAPES: Mapping[str, Shape] = {
    "token_embd.weight": ("n_embd", "n_vocab"),
    "output_norm.weight": ("n_embd",),
    "output.weight": ("n_embd", "n_vocab"),
    "output.bias": ("n_vocab",),
    "output_norm.bias": ("n_embd",),
}
ROPE_FACTORS = tuple(f"rope_{name}.weight" for name in ("freqs", "factors_long", "factors_short"))
LAYER_SHAPES: Mapping[str, Shape] = {
    "attn_norm": ("n_embd",),
    "attn_q": ("n_embd", "n_embd_q"),
    "attn_k": ("n_embd", "n_embd_kv"),
    "attn_v": ("n_embd", "n_embd_kv"),
    "attn_qkv": ("n_embd", "n_embd_q+n_embd_kv+n_embd_kv"),
    "attn_q_norm": ("head_dim",),
    "attn_k_norm": ("head_dim",),
    "attn_output": ("n_embd_q", "n_embd"),
    "attn_sinks": ("n_head",),
    "post_attention_norm": ("n_embd",),
    "ffn_norm": ("n_embd",),
    "ffn_gate": ("n_embd", "n_ff"),
    "ffn_up": ("n_embd", "n_ff"),
    "ffn_down": ("n_ff", "n_embd"),
    "ffn_gate_inp": ("n_embd", "n_expert"),
    "ffn_gate_exps": ("n_embd", "n_ff_exp", "n_expert"),
    "ffn_up_exps": ("n_embd", "n_ff_exp", "n_expert"),
    "ffn_down_exps": ("n_ff_exp", "n_embd", "n_expert"),
    "ffn_gate_inp_shexp": ("n_embd",),
    "ffn_gate_shexp": ("n_embd", "n_ff_shexp"),
    "ffn_up_shexp": ("n_embd", "n_ff_shexp"),
    "ffn_down_shexp": ("n_ff_shexp", "n_embd"),
    "post_ffw_norm": ("n_embd",),
}
EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
SHARED = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
