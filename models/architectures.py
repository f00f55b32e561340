"""What differs between architectures, as data: one entry each, and the tensors that an entry asks for.

An entry says what differs from `llama`. Facts are those of llama.cpp (src/models/*.cpp), whose converter makes the
files. A new architecture is a new entry as long as its layer has the shape of models/layer.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

Shape = tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """One value of `general.architecture`.

    rope_style: "norm" or "neox", see backend.Rope. activation: of the ffn, see Recorder.gated; gated: it has a gate.
    qkv, gate_up: tensors whose rows, one after the other, make q, k, v and gate, up. norms: tensors of norms, of which
    a file may leave out optional_norms; layer_norm: they subtract the mean, and have biases. attn_norm and the one
    called as ffn_norm says stand before attention and ffn, attn_q_norm and attn_k_norm before the rotation (per head,
    unless `shapes` says otherwise), post_attention_norm and post_ffw_norm after what is added to the residual stream.
    Where an optional ffn_norm is missing, attention and ffn read the same normed values. sinks: attention has them.

    rope_factors: `rope_freqs.weight`, or rope_factors_long and _short, are used if there. no_rope_period: every so
    manieth layer does not rotate. scaled_embd: embeddings are multiplied by sqrt(n_embd). n_embd_scale_n_layer: the
    numbers of layers with which q.k is scaled by 1/sqrt(n_embd/n_head), not 1/sqrt(head_dim). attn_softcap,
    final_softcap: of attention's scores and the logits where the file says nothing; 0: none. Where a file has a sliding
    window, every swa_period-th layer sees all positions all the same (0: none does). swa_rope_freq_base: rotary base of
    the window's layers unless the file has one (0: that of the others); swa_rope_scaled: rope scaling is theirs too.
    yarn_truncate: YaRN's ramp begins and ends at whole pairs.

    moe: "no", "yes", or "maybe": if the file says so. expert_norm: see Moe.norm. expert_activation: if another than
    activation. shared_gate: the shared expert's output is weighted. shapes: tensors that have another shape than
    LAYER_SHAPES says.
    """

    name: str
    rope_style: str = "norm"
    activation: str = "silu"
    gated: bool = True
    qkv: tuple[str, ...] = ("attn_q", "attn_k", "attn_v")
    gate_up: tuple[str, ...] = ("ffn_gate", "ffn_up")
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")
    optional_norms: tuple[str, ...] = ()
    ffn_norm: str = "ffn_norm"
    layer_norm: bool = False
    sinks: bool = False
    rope_factors: bool = False
    no_rope_period: int = 0
    scaled_embd: bool = False
    n_embd_scale_n_layer: tuple[int, ...] = ()
    attn_softcap: float = 0.0
    final_softcap: float = 0.0
    swa_period: int = 0
    swa_rope_freq_base: float = 0.0
    swa_rope_scaled: bool = True
    yarn_truncate: bool = True
    moe: str = "no"
    expert_norm: bool = True
    expert_activation: str = ""
    shared_gate: bool = False
    shapes: Mapping[str, Shape] = field(default_factory=dict)

    @property
    def norm_per_head(self) -> bool:
        """Whether attn_q_norm and attn_k_norm see a head, not a row."""
        return {**LAYER_SHAPES, **self.shapes}["attn_q_norm"][0] == "head_dim"


_PRE = ("attn_norm", "ffn_norm")
_QK = ("attn_q_norm", "attn_k_norm")
_POST = ("post_attention_norm", "post_ffw_norm")
_WHOLE_ROW = {"attn_q_norm": ("n_embd_q",), "attn_k_norm": ("n_embd_kv",)}

_ENTRIES = (
    # Llama 1 to 3.x, Mistral, Mixtral, and most models that copy their layer (SmolLM, TinyLlama, Yi ...).
    Architecture("llama", rope_factors=True, moe="maybe"),
    Architecture("mistral3", rope_factors=True, moe="maybe"),
    Architecture("smollm3", no_rope_period=4),
    Architecture("internlm2"),
    Architecture("granite", rope_factors=True),
    Architecture("granitemoe", rope_factors=True, moe="yes"),
    Architecture("qwen2", rope_style="neox"),
    Architecture("qwen2moe", rope_style="neox", moe="yes", expert_norm=False, shared_gate=True),
    Architecture("qwen3", rope_style="neox", norms=(*_PRE, *_QK)),
    Architecture("qwen3moe", rope_style="neox", norms=(*_PRE, *_QK), moe="yes"),
    Architecture("deepseek", rope_factors=True, moe="yes", expert_norm=False),
    Architecture(
        "phi3",
        rope_style="neox",
        qkv=("attn_qkv",),
        gate_up=("ffn_up",),
        rope_factors=True,
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
