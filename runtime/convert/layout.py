"""What a row of the table of checkpoints has. shared.py has the names and keys that several rows share.

A row says where a checkpoint differs from Llama's. models/architectures.py has the other half: which tensors a layer
needs, and their shapes. The facts are those of llama.cpp's converter (2026-09): other programs expect its files.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf_run.formats.gguf.metadata import Typed
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.models.architectures import Architecture, architecture
from gguf_run.runtime.convert.shared import BASE_KEYS, EXPERT_KEYS, LLAMA, MODEL, Key, Names
from gguf_run.runtime.convert.stored.checkpoint import Config


@dataclass(frozen=True)
class CheckpointLayout:
    """One architecture of checkpoints."""

    arch: str  # general.architecture
    # Class -> model_type, as in config.json. The way back writes the first; the last if experts are optional and there.
    classes: Mapping[str, str]
    layer: Names = field(default_factory=lambda: LLAMA)  # modules of a layer
    model: Names = field(default_factory=lambda: MODEL)  # modules beside the layers
    # Tensors without ".weight" in the checkpoint. Matrices of experts are [n_in, n_out], unless n_in comes last.
    bare: tuple[str, ...] = ()
    # Tensors of one number in each layer -> key of their array.
    numbers: Mapping[str, str] = field(default_factory=dict)
    one_way: bool = False  # config.json has what a GGUF file does not, or nobody writes it back
    permuted: bool = False  # rows of q and k come as two halves of each head; GGUF has them in pairs
    interleaved: bool = False  # a tensor with two names has their rows in turns, not one half after the other
    norm_offset: float = 0.0  # added to the weights of norms
    tied_copy: bool = False  # output.weight is written even where it is the same as token_embd.weight
    keys: tuple[Key, ...] = ()  # metadata beyond BASE_KEYS, or instead of one of them
    # Yields further metadata of config.json, given which layers have a window.
    more_keys: Callable[[Config, list[bool]], Iterator[tuple[str, Typed]]] | None = None
    rope_dim: bool = False  # rope.dimension_count is written
    rope_type: str = ""  # rope.scaling.type where config.json asks for no scaling
    ntk_alpha: bool = False  # the factor alpha of dynamic scaling makes a greater rope.freq_base
    # rope.scaling.yarn_log_multiplier is so many times mscale_all_dim; 0: rope.scaling.attn_factor has all factors.
    yarn_log: float = 0.0
    original_context: bool = False  # rope.scaling.original_context_length is written for every kind of scaling
    bias_key: str = "attention_bias"  # config.json: whether q, k and v have biases; "": nothing says it
    # Which layers have the window: "all", "last" (from max_window_layers on), "first" (every other one below
    # max_window_layers), "period" (all but every n-th), "unrotated"; "": this architecture has no window.
    windows: str = ""
    switch: bool = False  # the window needs use_sliding_window
    aliases: Mapping[str, str] = field(default_factory=dict)  # names in config.json -> those of other checkpoints
    # Values that transformers assumes where config.json leaves a key out. null is no such place: it means "none".
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # Values of config.json that a GGUF file cannot tell: any other cannot be converted. See `fixed`.
    expected: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    # Returns the row and config.json with what must be computed from it: values of names that begin with "_".
    read: Callable[["CheckpointLayout", Config], tuple["CheckpointLayout", Config]] | None = None
    edit: Callable[[Config, str, Tensor], Tensor] | None = None  # changes a tensor, by its name in the GGUF file
    whole: tuple[str, ...] = ()  # tensors that get a module's rows as they are, though others come from it: see edit

    @property
    def decoder(self) -> Architecture:
        """What this program knows of the model in a GGUF file."""
        return architecture(self.arch)

    def all_keys(self) -> Sequence[Key]:
        """Return BASE_KEYS, in which `keys` replaces rows, and the rest of `keys`."""
        experts = EXPERT_KEYS if self.decoder.moe != "no" else ()
        return tuple({key[0]: key for key in (*BASE_KEYS, *experts, *self.keys)}.values())

    @property
    def fixed(self) -> Mapping[str, tuple[Any, ...]]:
        """`expected`, with the activation of most architectures."""
        return {"hidden_act": ("silu", "swish"), **self.expected}

    @property
    def goes_back(self) -> bool:
        """Whether a GGUF file can become such a checkpoint again: nothing is computed by functions of the row."""
        return not (self.one_way or self.aliases or self.read or self.edit or self.more_keys)
