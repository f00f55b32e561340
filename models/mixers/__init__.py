"""What layers have in place of attention, or beside it. Each module here has one kind, with a function `read`:

read(keys: Keys) -> Mixer
"""

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from gguf_run.models.operands import Buffer

Shapes = dict[str, tuple[int, ...]]  # ne by the name of a tensor, without "blk.N."


class Mixer(Protocol):
    """The numbers of a model's mixer, and its ops."""

    def attends(self, il: int) -> bool:
        """Whether layer il has attention with a cache of keys and values."""

    def tensors(self, il: int) -> tuple[Shapes, Shapes]:
        """Return the tensors that layer il needs beside those of attention and ffn, and those that it may have."""

    def states(self, il: int) -> tuple[int, ...]:
        """Return how many f32 numbers each state of layer il has for a sequence."""

    def add(self, step: Any, il: int, h: "Buffer", cache: Any) -> bool:
        """List the ops of layer il that add the mixer's result to the residual stream.

        step: a step.Step. Its type stands with the mixers, since step.py reads this file.
        h: the layer's normed input.
        cache: the layer's kv_cache.CacheLayer.

        Returns False if the layer has plain attention, which the caller adds. Then h is as it was.
        """
