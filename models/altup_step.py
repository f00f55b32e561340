"""The ops of Gemma 3n. A token has several streams of hidden states (AltUp): a layer computes one, predicts the others.

Beside attention, each layer has a product of low rank (Laurel). The ffn of some layers has sparse activations.
"""

import numpy as np

from gguf_run.models import gemma_step, made_weights, ops, rare_ops
from gguf_run.models.kv_cache import CacheLayer
from gguf_run.models.operands import Buffer
from gguf_run.models.ops import Cache, Experts, Squares, State, Table, Vector, Weight
from gguf_run.models.per_layer import AltUp
from gguf_run.models.step import buffer

_LEAST = 1e-5  # mean square that a stream is scaled by at most


class Step(gemma_step.Step[Table, Weight, Vector, Cache, Experts, Squares, State]):
    """step.Step of these models. x is the first stream while a layer computes it."""

    @property
    def _altup(self) -> AltUp:
        assert self.config.altup is not None
        return self.config.altup

    def name_buffers(self, *, outputs: bool) -> None:
        super().name_buffers(outputs=outputs)
        n, n_stream = self.config.n_embd, self._altup.n_stream
        self._streams, self._predicted = (buffer(name, n * n_stream, outputs) for name in ("streams", "predicted"))
        self._modes, self._coef = buffer("modes", n_stream, outputs), buffer("coef", n_stream**2, outputs)
        self._laurel = buffer("laurel", self._altup.n_laurel, outputs)
        self._wide = buffer("wide", 2 * self.config.n_ff, outputs)

    def only_outputs(self) -> None:
        predicted = self._predicted
        super().only_outputs()
        self._predicted = self.wanted(predicted)

    def before(self, il: int) -> tuple[Buffer, ...]:
        return (self._streams if 0 < il < self.config.n_layer else self.x, *super().before(il)[1:])

    def _parts(self, x: Buffer) -> list[Buffer]:
        """Return the streams of a buffer."""
        n = self.config.n_embd
        return [x.columns(i * n, n) for i in range(self._altup.n_stream)]

    def _others(self, x: Buffer) -> Buffer:
        """Return all streams of a buffer but the first one."""
        return x.columns(self.config.n_embd, x.width - self.config.n_embd)

    def _choose(self, x: Buffer, block: str, name: str, n: int) -> Buffer:
        """Return n coefficients of Mix: name @ tanh(router(norm(x)) / E)."""
        self.norm(x, f"{block}altup_router_norm", self._h)
        self.matmul(self._h, self.load.matrix(f"{block}altup_router"), self._modes)
        self.add(rare_ops.Softcap(self._modes, 1 / self.config.n_embd, 1.0))
        self.matmul(self._modes, self.load.matrix(f"{block}{name}"), coef := self._coef.columns(0, n))
        return coef

    def begin(self, il: int) -> None:
        """predicted = the layer's prediction of its streams, of which the first one is x"""
        super().begin(il)
        n, altup = self.config.n_embd, self._altup
        first, *_ = self._parts(self._streams)
        if il == 0:
            self.matmul(self.x, made_weights.matrices(self.load, "altup_proj"), self._others(self._streams))
            self.add(rare_ops.MatchRms(self._others(self._streams), self.x, _LEAST))
            self.add(rare_ops.Mix(self.x, self.x, first, n))
        coef = self._choose(first, f"blk.{il}.", "altup_predict_coef", altup.n_stream**2)
        self.add(rare_ops.Mix(self._streams, self._streams, self._predicted, n, coef))
        self.add(rare_ops.Mix(first, self._streams, self.x, n, coef.columns(0, altup.n_stream)))

    def project(self, il: int, h: Buffer) -> None:
        """qkv = q, k and v of h; x += h + norm(Laurel's product of h)"""
        super().project(il, h)
        block, (first, *_) = f"blk.{il}.", self._parts(self._predicted)
        self.matmul(h, self.load.matrix(f"{block}laurel_l"), self._laurel)
        self.matmul(self._laurel, self.load.matrix(f"{block}laurel_r"), self._sum)
        self.norm(first, f"{block}attn_norm", self.x, residual=self.x)
        self.norm(self._sum, f"{block}laurel_post_norm", self.x, residual=self.x)

    def attend(self, il: int, cache: CacheLayer[Cache, State]) -> None:
        super().attend(il, cache)
        self.add(rare_ops.Softcap(self.x, 0.5**0.5, 0.0))

    def gated(self, il: int, h: Buffer) -> Buffer:
        factor, block, n = self._altup.sparsity[il], f"blk.{il}.", self.config.layers[il].n_ff
        if factor == -np.inf:
            return super().gated(il, h)
        wide, ff = self._wide.columns(0, 2 * n), self._ff.columns(0, n)
        self.matmul(h, self.load.matrix(f"{block}ffn_gate", f"{block}ffn_up"), wide)
        self.add(rare_ops.Threshold(wide.columns(0, n), factor))
        self.add(ops.Gated(wide.columns(0, n), wide.columns(n, n), ff, "gelu"))
        return ff

    def finish(self, il: int) -> None:
        """streams = predicted + coef * (x - the first predicted one); all but the first get the layer's embedding"""
        config, n, block, n_stream = self.config, self.config.n_embd, f"blk.{il}.", self._altup.n_stream
        coef = self._choose(self.x, block, "altup_correct_coef", n_stream)
        minus, *_ = self._parts(self._predicted)
        self.add(rare_ops.Mix(self._predicted, self.x, self._streams, n, coef, minus, 1.0))
        first, *others = self._parts(self._streams)
        gate, ple = self._gate_in, self._ple.columns(il * config.n_ple, config.n_ple)
        scaled = made_weights.with_columns_scaled(self.load, f"{block}inp_gate", f"{block}altup_correct_scale")
        self.matmul(first, scaled, gate)
        self.add(ops.Gated(gate, ple, gate, "gelu"))
        self.matmul(gate, self.load.matrix(f"{block}proj"), self._h)
        for stream in others:
            self.norm(self._h, f"{block}post_norm", stream, residual=stream)
        if il == config.n_layer - 1:
            self._join()

    def _join(self) -> None:
        """x = the mean of all streams. All but the first one go through matrices, and are made as large as it."""
        first, *others = self._parts(self._streams)
        for i, stream in enumerate(others):
            matrix = made_weights.matrices(self.load, "altup_unembd_proj", i)
            self.matmul(stream, matrix, self._parts(self._predicted)[1 + i])
        self.add(rare_ops.MatchRms(self._others(self._predicted), first, _LEAST))
        self.add(rare_ops.Mix(first, self._others(self._predicted), self.x, self.config.n_embd, shift=1.0))
        self.add(rare_ops.Softcap(self.x, 1 / self._altup.n_stream, 0.0))
