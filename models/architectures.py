"""What differs between architectures, as data: one entry each, and the tensors that an entry asks for.

An entry says what differs from `llama`. Facts are those of llama.cpp (src/models/*.cpp), whose converter makes the
files. A new architecture is a new entry as long as its layer has the shape of models/decoder.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

Shape = tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """One value of `general.architecture`.

    rope_style: "norm" or "neox", see backend.Rope. activation: of the gate, see Recorder.gated. qkv, gate_up: tensors
    whose rows, one after the other, make q, k, v and gate, up. norms: tensors of norms beyond attn_norm and ffn_norm;
    attn_q_norm and attn_k_norm act per head before the rotation, post_attention_norm and post_ffw_norm on what is added
    to the residual stream. rope_factors: `rope_freqs.weight` is used if there. scaled_embd: embeddings are multiplied
    by sqrt(n_embd). swa_period: every swa_period-th layer sees all positions and the others a sliding window (0: all
    layers see all); swa_rope_freq_base: rotary base of the window's layers unless the file has one.
    n_embd_scale_n_layer: the numbers of layers with which q.k is scaled by 1/sqrt(n_embd/n_head), not 1/sqrt(head_dim).
    shapes: tensors that have another shape than LAYER_SHAPES says.
    """

    name: str
    rope_style: str = "norm"
    activation: str = "silu"
    qkv: tuple[str, ...] = ("attn_q", "attn_k", "attn_v")
    gate_up: tuple[str, ...] = ("ffn_gate", "ffn_up")
    norms: tuple[str, ...] = ()
    rope_factors: bool = False
    scaled_embd: bool = False
    swa_period: int = 0
    swa_rope_freq_base: float = 1e4
    n_embd_scale_n_layer: tuple[int, ...] = ()
    shapes: Mapping[str, Shape] = field(default_factory=dict)

    @property
    def matrices(self) -> tuple[str, ...]:
        """The matrices of a layer, each of which may have a bias."""
        return (*self.qkv, "attn_output", *self.gate_up, "ffn_down")


_ENTRIES = (
    # Llama 1 to 3.x, Mistral, and most models that copy their layer (SmolLM, TinyLlama, Yi ...).
    Architecture("llama", rope_factors=True),
    Architecture(
        "gemma3",
        rope_style="neox",
        activation="gelu",
        norms=("attn_q_norm", "attn_k_norm", "post_attention_norm", "post_ffw_norm"),
        scaled_embd=True,
        swa_period=6,
        n_embd_scale_n_layer=(62,),  # 27B
    ),
)
ARCHITECTURES: Mapping[str, Architecture] = {entry.name: entry for entry in _ENTRIES}

# Tensors by name, ggml order: ne[0] (row length) first. A word is a field of ModelConfig, "a+b" the sum of two.
MODEL_SHAPES: Mapping[str, Shape] = {
    "token_embd.weight": ("n_embd", "n_vocab"),
    "output_norm.weight": ("n_embd",),
    "output.weight": ("n_embd", "n_vocab"),
    "output.bias": ("n_vocab",),
    "rope_freqs.weight": ("n_rope_freqs",),
}
LAYER_SHAPES: Mapping[str, Shape] = {
    "attn_norm": ("n_embd",),
    "attn_q": ("n_embd", "n_embd_q"),
    "attn_k": ("n_embd", "n_embd_kv"),
    "attn_v": ("n_embd", "n_embd_kv"),
    "attn_qkv": ("n_embd", "n_embd_q+n_embd_kv+n_embd_kv"),
    "attn_q_norm": ("head_dim",),
    "attn_k_norm": ("head_dim",),
    "attn_output": ("n_embd_q", "n_embd"),
    "post_attention_norm": ("n_embd",),
    "ffn_norm": ("n_embd",),
    "ffn_gate": ("n_embd", "n_ff"),
    "ffn_up": ("n_embd", "n_ff"),
    "ffn_down": ("n_ff", "n_embd"),
    "post_ffw_norm": ("n_embd",),
}


def required_tensors(arch: Architecture, n_layer: int) -> dict[str, Shape]:
    """Return name and shape of every tensor without which a model of this architecture cannot run."""
    names = ("attn_norm", "ffn_norm", *arch.norms, *arch.matrices)
    shapes = {**LAYER_SHAPES, **arch.shapes}
    required = {name: MODEL_SHAPES[name] for name in ("token_embd.weight", "output_norm.weight")}
    return required | {f"blk.{il}.{name}.weight": shapes[name] for il in range(n_layer) for name in names}


def optional_tensors(arch: Architecture, n_layer: int) -> dict[str, Shape]:
    """Return name and shape of the tensors that are used where a file has them: biases, an output matrix ..."""
    names = ["output.weight", "output.bias", *(["rope_freqs.weight"] if arch.rope_factors else [])]
    shapes = {**LAYER_SHAPES, **arch.shapes}
    optional = {name: MODEL_SHAPES[name] for name in names}
    return optional | {f"blk.{il}.{name}.bias": shapes[name][-1:] for il in range(n_layer) for name in arch.matrices}
