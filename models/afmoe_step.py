"""The ops of AFMoE: attention has a gate, and the sum of all experts is normed before it is added to x."""

from gguf_run.models import step
from gguf_run.models.kv_cache import CacheLayer
from gguf_run.models.operands import Buffer
from gguf_run.models.ops import Cache, Experts, Squares, State, Table, Vector, Weight


class Step(step.Step[Table, Weight, Vector, Cache, Experts, Squares, State]):
    """step.Step of these models."""

    def name_buffers(self, *, outputs: bool) -> None:
        super().name_buffers(outputs=outputs)
        self._sum = step.buffer("sum", self.config.n_embd, outputs)
        self._attn_gate = step.buffer("attn_gate", self.config.n_embd_q, outputs)

    def project(self, il: int, h: Buffer) -> None:
        super().project(il, h)
        self.matmul(h, self.load.matrix(f"blk.{il}.attn_gate"), self._attn_gate)

    def attend(self, il: int, cache: CacheLayer[Cache, State]) -> None:
        self.attention(il, cache, self._qkv, self._attn_gate)

    @property
    def to_experts(self) -> tuple[Buffer, ...]:
        return (*super().to_experts, self._sum)

    def ffn(self, il: int, h: Buffer, experts: bool) -> None:
        """x += norm(experts + shared expert), or norm(ffn) in a layer without experts"""
        if not self.config.layers[il].has_experts:
            super().ffn(il, h, experts)
            return
        self.matmul(h, self.load.matrix(f"blk.{il}.ffn_gate_inp"), self._router)
        if self.config.n_ff_shexp:
            self.matmul(self.gated(il, h), self.load.matrix(f"blk.{il}.ffn_down_shexp"), self._sum)
        if experts:
            self.experts(il)

    def experts(self, il: int) -> None:
        self.moe(il, self._sum, accumulate=self.config.n_ff_shexp > 0)
        self.norm(self._sum, f"blk.{il}.post_ffw_norm", self.x, residual=self.x)
