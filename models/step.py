"""The ops of a step: what the layers of a model compute, as lists for one backend."""

from dataclasses import dataclass
from typing import Generic

from gguf_run.models import ops
from gguf_run.models.backend import Backend
from gguf_run.models.config import ModelConfig
from gguf_run.models.layer import Layer, LayerExperts, Matrix, Norm
from gguf_run.models.operands import (
    Buffer,
    Cache,
    Experts,
    Squares,
    SquaresHandle,
    Table,
    Vector,
    Weight,
)


@dataclass(frozen=True)
class Observed:
    """Squares of the input that some matrices share."""

    names: tuple[str, ...]  # tensors of the matrices
    squares: SquaresHandle


class Step(Generic[Table, Weight, Vector, Cache, Experts, Squares]):
    """Builds the lists of one backend: the parts of its program, and the ops for the wanted rows.

    All layers use the same buffers. x is the residual stream.
    """

    def __init__(
        self,
        backend: Backend[Table, Weight, Vector, Cache, Experts, Squares],
        config: ModelConfig,
        observed: list[Observed] | None,
    ) -> None:
        """backend: makes the sums of squares. observed: gets the input of every matmul; None: nothing is observed."""
        self._backend, self._config, self._observed = backend, config, observed
        self.parts: list[list[ops.Op[Table, Weight, Vector, Cache, Experts, Squares]]] = []
        self.after: list[ops.Op[Table, Weight, Vector, Cache, Experts, Squares]] = []
        self._ops = self.after  # the list that grows
        self.x = Buffer.whole("x", config.n_embd)
        self._qkv = Buffer.whole("qkv", config.n_embd_q + 2 * config.n_embd_kv)
        self._attn = Buffer.whole("attn", config.n_embd_q)
        self._name_buffers(outputs=False)

    def _name_buffers(self, *, outputs: bool) -> None:
        """Name the buffers that the ffn and the output use. outputs: those of the wanted rows."""
        config, end = self._config, "_out" if outputs else ""
        self._h = Buffer.whole(f"h{end}", config.n_embd, outputs=outputs)
        self._ff = Buffer.whole(f"ff{end}", max(config.n_ff, config.n_ff_shexp), outputs=outputs)
        self._router = Buffer.whole(f"router{end}", config.n_expert, outputs=outputs)
        self._gate = Buffer.whole(f"gate{end}", 1, outputs=outputs)

    def new_part(self) -> None:
        """The following ops belong to a new part, which runs by itself."""
        self._ops = []
        self.parts.append(self._ops)

    def embed(self, table: Table) -> None:
        """x = embeddings of the tokens"""
        self._ops.append(ops.Embed(table, self.x, self._config.embd_scale))

    def attention(self, layer: Layer[Weight, Vector, Cache]) -> None:
        """x += attention(norm(x)), and the ffn too, if both are parallel"""
        config, qkv = self._config, self._qkv
        n_q, n_kv, head_dim = config.n_embd_q, config.n_embd_kv, config.head_dim
        q, k, v = qkv.columns(0, n_q), qkv.columns(n_q, n_kv), qkv.columns(n_q + n_kv, n_kv)
        h = self._normed(layer.attn_norm)
        self._matmul(h, layer.attn_qkv, qkv)
        if layer.parallel:
            self._ffn(layer, h, None)
        for part, norm, n_head in ((q, layer.attn_q_norm, config.n_head), (k, layer.attn_k_norm, config.n_head_kv)):
            if norm is not None:
                self._norm(part, norm, part, n_group=n_head if config.arch.norm_per_head else 1)
        if layer.rotation is not None:
            self._ops.append(ops.Rope(qkv.columns(0, n_q + n_kv), layer.rotation, head_dim))
        self._ops.append(ops.Attend(q, k, v, layer.cache, layer.attention, self._attn, layer.attn_sinks))
        self._add(self._attn, layer.attn_output, layer.post_attention_norm)

    def ffn(self, layer: Layer[Weight, Vector, Cache], experts: LayerExperts[Experts] | None) -> None:
        """x += down(activation(gate(norm(x))) * up(norm(x)))

        experts: those of the layer, which are added to x as well. None if the layer has none, or if another backend has
        them, whose Step then reads `to_experts`.
        """
        if not layer.parallel:
            self._ffn(layer, self._normed(layer.ffn_norm), experts)

    @property
    def to_experts(self) -> tuple[Buffer, ...]:
        """The buffers that `experts` reads: x, to which experts are added, their input, the router's logits."""
        return self.x, self._h, self._router

    def experts(self, layer: LayerExperts[Experts]) -> None:
        """x += the experts' part of the ffn, as the router's logits say"""
        config = self._config
        squares = None
        if self._observed is not None:
            widths = config.n_embd, config.n_ff_exp
            squares = (
                self._backend.squares(widths[0], config.n_expert),
                self._backend.squares(widths[1], config.n_expert),
            )
            self._observed += [Observed(layer.names[:2], squares[0]), Observed(layer.names[2:], squares[1])]
        self._ops.append(ops.Moe(self._h, self._router, layer.experts, config.moe, self.x, squares))

    def only_outputs(self) -> None:
        """The following ops are for the wanted rows only: the residual stream is copied, other buffers are new."""
        x, self.x = self.x, Buffer.whole("x_out", self._config.n_embd, outputs=True)
        self._ops = self.after
        self._ops.append(ops.Outputs(x, self.x))
        self._name_buffers(outputs=True)

    def logits(self, norm: Norm[Vector], matrix: Matrix[Weight, Vector]) -> Buffer:
        """Return the buffer of the logits, softcap(output(norm(x)))."""
        config = self._config
        self._norm(self.x, norm, self._h)
        logits = Buffer.whole("logits", config.n_vocab, outputs=True)
        self._matmul(self._h, matrix, logits)
        if config.logit_scale != 1 or config.final_softcap:
            self._ops.append(ops.Softcap(logits, config.logit_scale, config.final_softcap))
        return logits

    def _ffn(self, layer: Layer[Weight, Vector, Cache], h: Buffer, experts: LayerExperts[Experts] | None) -> None:
        if layer.ffn_gate_inp is not None:
            self._matmul(h, layer.ffn_gate_inp, self._router)
        if experts is not None:
            self.experts(experts)
        if layer.ffn_gate_up is None or layer.ffn_down is None:
            return
        activation, gate_up = self._config.arch.activation, layer.ffn_gate_up
        ff = self._ff.columns(0, layer.ffn_down.weight.n_in)
        if self._config.arch.gated:
            self._observe(h, gate_up)
            self._ops.append(ops.MatmulGated(h, gate_up.weight, ff, activation, gate_up.bias))
        else:
            self._matmul(h, gate_up, ff)
            self._ops.append(ops.Gated(ff, None, ff, activation))
        if layer.ffn_gate_shexp is not None and self._config.arch.shared_gate:
            self._matmul(h, layer.ffn_gate_shexp, self._gate)
            self._ops.append(ops.GateRows(ff, self._gate))
        self._add(ff, layer.ffn_down, layer.post_ffw_norm)

    def _normed(self, norm: Norm[Vector] | None) -> Buffer:
        """Return what attention or the ffn reads: norm(x), or x."""
        if norm is None:
            return self.x
        self._norm(self.x, norm, self._h)
        return self._h

    def _norm(
        self, x: Buffer, norm: Norm[Vector], out: Buffer, n_group: int = 1, residual: Buffer | None = None
    ) -> None:
        eps = self._config.rms_eps
        if self._config.arch.layer_norm:
            assert residual is None
            self._ops.append(ops.LayerNorm(x, norm.weight, norm.bias, out, eps, n_group))
        else:
            self._ops.append(ops.RmsNorm(x, norm.weight, out, eps, n_group, residual))

    def _matmul(self, x: Buffer, matrix: Matrix[Weight, Vector], out: Buffer, residual: Buffer | None = None) -> None:
        self._observe(x, matrix)
        self._ops.append(ops.Matmul(x, matrix.weight, out, matrix.bias, residual))

    def _observe(self, x: Buffer, matrix: Matrix[Weight, Vector]) -> None:
        if self._observed is not None:
            squares = self._backend.squares(x.width)
            self._observed.append(Observed(matrix.names, squares))
            self._ops.append(ops.Observe(x, squares))

    def _add(self, y: Buffer, matrix: Matrix[Weight, Vector], post_norm: Norm[Vector] | None) -> None:
        """x += matrix @ y, normed first where the architecture says so"""
        if post_norm is None:
            self._matmul(y, matrix, self.x, residual=self.x)
        else:
            self._matmul(y, matrix, self._h)
            self._norm(self._h, post_norm, self.x, residual=self.x)
