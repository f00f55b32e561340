"""Mamba 2: a short convolution, a state space, a gate and a norm, in place of attention or beside it.

Granite 4 and Nemotron-H have it in layers without attention, Falcon-H1 in all layers. Nemotron-H's layers with a
feed-forward network have only that.
"""

from typing import Any

from gguf_run.formats.frozen import frozen
from gguf_run.models.keys import Keys
from gguf_run.models.mixers import Shapes
from gguf_run.models.operands import Buffer
from gguf_run.models.ops import Gated, RmsNorm
from gguf_run.models.rare_ops import Scan, ShortConv


@frozen
class Mamba:
    """models.mixers.Mixer."""

    n_embd: int
    n_inner: int  # columns of the heads
    n_state: int  # columns of b and of c in a group
    n_head: int
    n_group: int
    n_taps: int
    attention: tuple[bool, ...]  # which layers have attention
    mamba: tuple[bool, ...]  # which layers have Mamba 2
    needs_norm: bool

    @property
    def n_conv(self) -> int:
        """Columns that go through the convolution: x, b and c."""
        return self.n_inner + 2 * self.n_group * self.n_state

    def attends(self, il: int) -> bool:
        return self.attention[il]

    def tensors(self, il: int) -> tuple[Shapes, Shapes]:
        if not self.mamba[il]:
            return {}, {}
        norm: Shapes = {"ssm_norm.weight": (self.n_inner // self.n_group, self.n_group)}
        required: Shapes = {
            "ssm_in.weight": (self.n_embd, self.n_inner + self.n_conv + self.n_head),
            "ssm_conv1d.weight": (self.n_taps, self.n_conv),
            "ssm_dt.bias": (self.n_head,),
            "ssm_a.weight": (1, self.n_head),  # llama.cpp writes both without ".weight"
            "ssm_d.weight": (1, self.n_head),
            "ssm_out.weight": (self.n_inner, self.n_embd),
        }
        optional: Shapes = {"ssm_conv1d.bias": (self.n_conv,)}
        return (required | norm, optional) if self.needs_norm else (required, optional | norm)

    def states(self, il: int) -> tuple[int, ...]:
        return ((self.n_taps - 1) * self.n_conv, self.n_inner * self.n_state) if self.mamba[il] else ()

    def add(self, step: Any, il: int, h: Buffer, cache: Any) -> bool:
        if not self.mamba[il]:
            return False
        load, block, n, n_bc = step.load, f"blk.{il}.", self.n_inner, self.n_group * self.n_state
        parts = Buffer.whole("ssm", n + self.n_conv + self.n_head)
        z, xbc, dt = parts.columns(0, n), parts.columns(n, self.n_conv), parts.columns(n + self.n_conv, self.n_head)
        x, b, c = xbc.columns(0, n), xbc.columns(n, n_bc), xbc.columns(n + n_bc, n_bc)
        a, d, bias = (load.vector(f"{block}{name}") for name in ("ssm_a", "ssm_d", "ssm_dt.bias"))
        taps, shift = load.norm(f"{block}ssm_conv1d")
        step.matmul(h, load.matrix(f"{block}ssm_in"), parts)
        step.add(ShortConv(xbc, taps, shift, cache.states[0], xbc, self.n_taps, "silu"))
        step.add(Scan(x, b, c, dt, bias, a, d, cache.states[1], x, self.n_head, self.n_group))
        step.add(Gated(z, x, x, "silu"))
        if (weight := load.vector(f"{block}ssm_norm")) is not None:
            step.add(RmsNorm(x, weight, x, step.config.inner_eps, self.n_group, is_grouped=True))
        step.matmul(x, load.matrix(f"{block}ssm_out"), step.x, residual=step.x)
        return not self.attention[il]


def read(keys: Keys) -> Mamba:
    n_layer, n_inner = keys.integer("block_count"), keys.integer("ssm.inner_size")
    n_head, n_group = keys.integer("ssm.time_step_rank"), keys.integer("ssm.group_count")
    if n_inner % n_head:
        raise keys.wrong("ssm.time_step_rank", f"a divisor of {keys.prefix}.ssm.inner_size, which is {n_inner}")
    if n_head % n_group:
        raise keys.wrong("ssm.group_count", f"a divisor of {keys.prefix}.ssm.time_step_rank, which is {n_head}")
    attention = tuple(n > 0 for n in keys.integers("attention.head_count_kv", n_layer, low=0))
    is_ffn = tuple(n > 0 for n in keys.integers("feed_forward_length", n_layer, low=0))
    mamba = tuple(not attends for attends in attention)
    if keys.prefix == "falcon-h1":
        mamba = (True,) * n_layer
    elif keys.prefix.startswith("nemotron_h"):
        mamba = tuple(not attends and not ffn for attends, ffn in zip(attention, is_ffn, strict=True))
    return Mamba(
        n_embd=keys.integer("embedding_length"),
        n_inner=n_inner,
        n_state=keys.integer("ssm.state_size"),
        n_head=n_head,
        n_group=n_group,
        n_taps=keys.integer("ssm.conv_kernel", low=2),
        attention=attention,
        mamba=mamba,
        needs_norm=keys.prefix != "falcon-h1",
    )
