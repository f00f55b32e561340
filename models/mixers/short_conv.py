"""LFM2's short convolution: x += out_proj(c * conv(b * x)), where b, c and x are thirds of in_proj(h)."""

from typing import Any

from gguf_run.formats.frozen import frozen
from gguf_run.models.keys import Keys
from gguf_run.models.mixers import Shapes
from gguf_run.models.operands import Buffer
from gguf_run.models.ops import Gated
from gguf_run.models.rare_ops import ShortConv


@frozen
class Convolutions:
    """models.mixers.Mixer."""

    n_embd: int
    n_taps: int
    n_head_kv: tuple[int, ...]  # of each layer; 0: the layer has a convolution in place of attention

    def attends(self, il: int) -> bool:
        return self.n_head_kv[il] > 0

    def tensors(self, il: int) -> tuple[Shapes, Shapes]:
        n = self.n_embd
        shapes: Shapes = {"in_proj.weight": (n, 3 * n), "conv.weight": (self.n_taps, n), "out_proj.weight": (n, n)}
        return {} if self.attends(il) else {f"shortconv.{name}": ne for name, ne in shapes.items()}, {}

    def states(self, il: int) -> tuple[int, ...]:
        return () if self.attends(il) else ((self.n_taps - 1) * self.n_embd,)

    def add(self, step: Any, il: int, h: Buffer, cache: Any) -> bool:
        if self.attends(il):
            return False
        n, block, load = self.n_embd, f"blk.{il}.shortconv", step.load
        bcx = Buffer.whole("bcx", 3 * n)
        b, c, x = (bcx.columns(i * n, n) for i in range(3))
        step.matmul(h, load.matrix(f"{block}.in_proj"), bcx)
        step.add(Gated(b, x, x, "identity"))
        step.add(ShortConv(x, load.vector(f"{block}.conv"), None, cache.states[0], x, self.n_taps, "identity"))
        step.add(Gated(c, x, x, "identity"))
        step.matmul(x, load.matrix(f"{block}.out_proj"), step.x, residual=step.x)
        return True


def read(keys: Keys) -> Convolutions:
    n_head_kv = keys.integers("attention.head_count_kv", keys.integer("block_count"), low=0)
    return Convolutions(keys.integer("embedding_length"), keys.integer("shortconv.l_cache", low=2), tuple(n_head_kv))
