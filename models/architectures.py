"""What one architecture differs in from `llama`, and the shapes of tensors. models/families has the entries.

The facts come from llama.cpp (src/models/*.cpp), whose converter writes the files.
"""

from collections.abc import Container, Iterator, Mapping
from dataclasses import field
from importlib import import_module

from gguf_run.formats.frozen import frozen

Shape = tuple[str, ...]


@frozen
class Architecture:
    """One value of `general.architecture`. The defaults are those of llama."""

    name: str
    rope_style: str = "norm"  # see operands.Rotation
    activation: str = "silu"  # of the ffn, see ops.Gated
    gated: bool = True  # the ffn has a gate
    qkv: tuple[str, ...] = ("attn_q", "attn_k", "attn_v")  # tensors whose rows make q, k and v, in this order; (): none
    gate_up: tuple[str, ...] = ("ffn_gate", "ffn_up")  # tensors whose rows make gate and up
    # Names of norms. attn_norm and `ffn_norm` come before attention and ffn, attn_q_norm and attn_k_norm before the
    # rotation. post_attention_norm and post_ffw_norm norm a result before it is added to the residual stream.
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")
    # Norms that a file may leave out, and tensors of `more`. Without ffn_norm, attention and ffn read the same values.
    optional_norms: tuple[str, ...] = ()
    ffn_norm: str = "ffn_norm"  # name of the norm before the ffn
    output_norm: str = "output_norm"  # name of the norm before the output matrix
    layer_norm: bool = False  # norms subtract the mean and have biases
    is_causal: bool = True  # a token sees no later ones; a key in the file goes first
    sinks: bool = False  # attention has sinks
    qk_norm_after_rope: bool = False  # attn_q_norm and attn_k_norm come after the rotation; not in `norms`: all ones
    no_qk_norm_n_expert: int = 0  # with so many experts, there is no such norm
    neox_by_sections: bool = False  # with a rope.dimension_sections that is not 0, rope_style is "neox"
    no_rope_period: int = 0  # every n-th layer does not rotate; 0: all rotate
    rope_key: str = ""  # a key that says whether any layer rotates; "": none
    window_rope: bool = False  # in a file with a window, only layers with the window rotate
    # Scale, length and offset of temperature.Temperature, for layers that do not rotate. (): keys of the file tell it.
    temperature: tuple[float, int, int] | tuple[()] = ()
    logits_multiplied: bool = False  # logit_scale multiplies the logits; False: it divides them
    v_of_k: bool = False  # a layer without attn_v makes v of what attn_k makes
    attention_scale: float = 0.0  # factor on q.k, unless the file has one; 0: 1/sqrt(head_dim)
    scaled_embd: bool = False  # embeddings are multiplied by sqrt(n_embd)
    n_embd_scale_n_layer: tuple[int, ...] = ()  # with one of these n_layer, q.k is scaled by 1/sqrt(n_embd/n_head)
    attn_softcap: float = 0.0  # softcap of attention's scores, unless the file has one; 0: none
    final_softcap: float = 0.0  # softcap of the logits, unless the file has one; 0: none
    # In a file with a window, every n-th layer sees all positions. 0: none does; -1: the file must tell.
    swa_period: int = 0
    swa_rope_freq_base: float = 0.0  # rope base of layers with a window, unless the file has one; 0: as other layers
    swa_rope_scaled: bool = True  # the rope scaling applies to layers with a window too
    yarn_truncate: bool = True  # YaRN's ramp begins and ends at whole pairs; a key in the file goes first
    chunk: int = 0  # windows begin at multiples of their length, which is this unless the file has one; 0: they do not
    moe: str = "no"  # whether layers have experts: "no", "yes", or "maybe" (the file tells)
    # See routing.Mixture.gating; a key in the file goes first. "": "sigmoid" with a bias, "softmax" without one.
    gating: str = "softmax"
    router_bias: str = "no"  # whether experts are chosen with a bias: "no", "yes", or "maybe" (the file tells)
    weighs_input: bool = False  # see routing.Mixture
    expert_norm: bool = True  # see routing.Mixture.norm; a key in the file goes first
    expert_activation: str = ""  # activation of the experts; "": the same as `activation`
    shared_gate: bool = False  # a gate weights the result of the shared expert
    dense_beside: bool = False  # a layer with experts has a dense ffn too
    step: str = ""  # module of models with a class Step, which lists the ops of a step; "": step.py
    mixer: str = ""  # module of models/mixers: what layers have in place of attention, or beside it
    shapes: Mapping[str, Shape] = field(default_factory=dict)  # shapes that differ from LAYER_SHAPES
    # Tensors beyond those that the other fields name. "blk.N." is that of each layer. One with a size 0 is not there.
    more: Mapping[str, Shape] = field(default_factory=dict)

    @property
    def norm_per_head(self) -> bool:
        """Whether attn_q_norm and attn_k_norm norm each head by itself. Otherwise they norm the whole row."""
        return {**LAYER_SHAPES, **self.shapes}["attn_q_norm"][0] == "head_dim"


PRE = ("attn_norm", "ffn_norm")
QK = ("attn_q_norm", "attn_k_norm")
POST = ("post_attention_norm", "post_ffw_norm")
WHOLE_ROW = {"attn_q_norm": ("n_embd_q",), "attn_k_norm": ("n_embd_kv",)}

_FAMILIES = ("dense", "gemma", "mixtures", "hybrid", "encoders")


def entries() -> Iterator[Architecture]:
    """Yield all architectures. A module of models/families is imported when its entries are reached."""
    # Llama 1 to 3.x, Mistral, Mixtral, and most models that copy their layer (SmolLM, TinyLlama, Yi ...).
    yield Architecture("llama", moe="maybe")
    for family in _FAMILIES:
        yield from import_module(f"gguf_run.models.families.{family}").ENTRIES


def architecture(name: str) -> Architecture:
    """Return the architecture of a name as in `general.architecture`. Raises KeyError for a name that is not known."""
    for entry in entries():
        if entry.name == name:
            return entry
    raise KeyError(name)


# Tensors by name, ggml order: ne[0] (row length) first. A word is a number, or a field of LayerConfig or
# ModelConfig; "a*b+c" is a sum of products.
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
    "post_ffw_norm": ("n_embd",),
}
QKV = ("attn_q", "attn_k", "attn_v")


def qkv_of(arch: Architecture, block: str, tensors: Container[str]) -> tuple[str, ...]:
    """Return the tensors that make q, k and v of a layer. A file may have one in place of three, or three in its place.

    block: "blk.N."
    """
    kinds = (names for names in (("attn_qkv",), QKV) if f"{block}{names[0]}.weight" in tensors)
    return next(kinds, arch.qkv) if arch.qkv else ()
