"""Qwen's hybrids: Gated DeltaNet (Yang et al., 2024, arXiv:2412.06464) in most layers, gated attention in the others.

DeltaNet:   qkv = silu(conv(W h)), then the delta rule, then norm of each head * silu(z), then ssm_out
attention:  result * sigmoid(gate), then attn_output
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import FormatError
from gguf_run.formats.frozen import frozen
from gguf_run.models.keys import MAX_LAYERS, Keys
from gguf_run.models.mixers import Shapes
from gguf_run.models.operands import Buffer
from gguf_run.models.ops import Gated, RmsNorm
from gguf_run.models.rare_ops import DeltaRule, ShortConv

Index = NDArray[np.intp]


@frozen
class DeltaNet:
    """models.mixers.Mixer."""

    arch: str
    n_embd: int
    recurrent: tuple[bool, ...]  # which layers have DeltaNet; the others have attention
    n_head_k: int
    n_head_v: int  # a multiple of n_head_k
    d_k: int  # columns of a head of q and of k
    d_v: int  # columns of a head of v and of z
    n_taps: int

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of q, k, v and z."""
        n_k, n_v = self.n_head_k * self.d_k, self.n_head_v * self.d_v
        return n_k, n_k, n_v, n_v

    @property
    def n_conv(self) -> int:
        """Columns that go through the convolution: q, k and v."""
        return sum(self.widths[:3])

    def attends(self, il: int) -> bool:
        return not self.recurrent[il]

    def tensors(self, il: int) -> tuple[Shapes, Shapes]:
        if self.attends(il):
            return {}, {}
        n, n_v, n_z = self.n_embd, self.n_head_v, self.widths[3]
        required: Shapes = {
            "ssm_conv1d.weight": (self.n_taps, self.n_conv),
            "ssm_dt.bias": (n_v,),
            "ssm_a": (n_v,),
            "ssm_norm.weight": (self.d_v,),
            "ssm_out.weight": (n_z, n),
        }
        inputs: Shapes = {"attn_qkv.weight": (n, self.n_conv), "attn_gate.weight": (n, n_z)}
        if self.arch != "qwen3next":
            return required | inputs | {"ssm_alpha.weight": (n, n_v), "ssm_beta.weight": (n, n_v)}, {}
        required["ssm_ba.weight"] = (n, 2 * n_v)
        return required, inputs | {"ssm_in.weight": (n, sum(self.widths))}  # old files have ssm_in

    def states(self, il: int) -> tuple[int, ...]:
        return () if self.attends(il) else ((self.n_taps - 1) * self.n_conv, self.n_head_v * self.d_k * self.d_v)

    def add(self, step: Any, il: int, h: Buffer, cache: Any) -> bool:
        (self._attention if self.attends(il) else self._delta_net)(step, il, h, cache)
        return True

    def _attention(self, step: Any, il: int, h: Buffer, cache: Any) -> None:
        """The tensor attn_q has q and gate of each head. All gates go before all q, so that q and k stay neighbours."""
        layer, names = step.config.layers[il], [f"blk.{il}.attn_{name}" for name in "qkv"]
        n, n_kv = layer.n_embd_q, layer.n_embd_kv
        q, gate = grouped(layer.n_head, (layer.head_dim, layer.head_dim))
        made = Buffer.whole("gated_qkv", 2 * n + 2 * n_kv)
        step.matmul(h, step.load.matrix(*names, orders={names[0]: np.concatenate([gate, q])}), made)
        step.attention(il, cache, made.columns(n, n + 2 * n_kv), gate=made.columns(0, n))

    def _delta_net(self, step: Any, il: int, h: Buffer, cache: Any) -> None:
        load, block, eps = step.load, f"blk.{il}.", step.config.inner_eps
        names, orders = self._inputs(load, block)
        made = Buffer.whole("delta_net", sum(self.widths) + 2 * self.n_head_v)
        step.matmul(h, load.matrix(*names, orders=orders), made)
        ends = itertools.accumulate((*self.widths, self.n_head_v, self.n_head_v), initial=0)
        q, k, v, z, beta, alpha = (made.columns(first, end - first) for first, end in itertools.pairwise(ends))
        conv = made.columns(0, self.n_conv)
        taps, a, dt, weight = (load.vector(block + name) for name in ("ssm_conv1d", "ssm_a", "ssm_dt.bias", "ssm_norm"))
        step.add(ShortConv(conv, taps, None, cache.states[0], conv, self.n_taps, "silu"))
        heads, is_tiled = (self.n_head_k, self.n_head_v), self.arch != "qwen3next"
        step.add(DeltaRule(q, k, v, alpha, beta, a, dt, cache.states[1], v, *heads, is_tiled, eps))
        step.add(RmsNorm(v, weight, v, eps, self.n_head_v))
        step.add(Gated(z, v, v, "silu"))
        step.matmul(v, load.matrix(f"{block}ssm_out"), step.x, residual=step.x)

    def _inputs(self, load: Any, block: str) -> tuple[list[str], dict[str, Index]]:
        """Return the tensors whose rows make q, k, v, z, beta and alpha, and the order of the rows of some of them."""
        names, orders = ["attn_qkv", "attn_gate", "ssm_beta", "ssm_alpha"], {}
        if self.arch == "qwen3next":
            r = self.n_head_v // self.n_head_k
            names[2:] = ["ssm_ba"]
            orders["ssm_ba"] = np.concatenate(grouped(self.n_head_k, (r, r)))
            if load.has(f"{block}ssm_in"):
                names[:2] = ["ssm_in"]
                orders["ssm_in"] = np.concatenate(grouped(self.n_head_k, [n // self.n_head_k for n in self.widths]))
        for name in names:
            if not load.has(block + name):
                raise FormatError(f"tensor {block}{name}.weight is missing: get the file again")
        return [block + name for name in names], {block + name: order for name, order in orders.items()}


def grouped(n_head: int, sizes: Sequence[int]) -> list[Index]:
    """Return the rows of each part of n_head groups, which have `sizes` rows of each part after the other."""
    index = np.arange(n_head * sum(sizes)).reshape(n_head, -1)
    return [part.reshape(-1) for part in np.split(index, np.cumsum(sizes)[:-1], axis=1)]


def read(keys: Keys) -> DeltaNet:
    n_block, n_k = keys.integer("block_count", high=MAX_LAYERS), keys.integer("ssm.group_count")
    n_v, n_inner = keys.integer("ssm.time_step_rank"), keys.integer("ssm.inner_size")
    if n_v % n_k:
        raise keys.wrong("ssm.time_step_rank", f"a multiple of {keys.prefix}.ssm.group_count, which is {n_k}")
    if n_inner % n_v:
        raise keys.wrong("ssm.inner_size", f"a multiple of {keys.prefix}.ssm.time_step_rank, which is {n_v}")
    period, given = keys.integer("full_attention_interval", 4), keys.get("attention.recurrent_layers")
    recurrent = tuple((il + 1) % period != 0 for il in range(n_block))
    if given is not None:
        if not isinstance(given, np.ndarray) or given.shape != (n_block,) or given.dtype.kind not in "biu":
            raise keys.wrong("attention.recurrent_layers", f"{n_block} booleans, one for a layer")
        recurrent = tuple(map(bool, given.tolist()))
    return DeltaNet(
        arch=keys.prefix,
        n_embd=keys.integer("embedding_length"),
        recurrent=recurrent,
        n_head_k=n_k,
        n_head_v=n_v,
        d_k=keys.integer("ssm.state_size"),
        d_v=n_inner // n_v,
        n_taps=keys.integer("ssm.conv_kernel", low=2),
    )
