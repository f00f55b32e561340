"""The ops of a step: what the layers of a model compute, as lists for one backend."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic

from gguf_run.formats.frozen import frozen
from gguf_run.models import ops
from gguf_run.models.config import ModelConfig
from gguf_run.models.kv_cache import CacheLayer
from gguf_run.models.operands import Buffer
from gguf_run.models.ops import Cache, Experts, Squares, State, Table, Vector, Weight
from gguf_run.models.weights import Loader, Matrix

if TYPE_CHECKING:
    from gguf_run.models.handles import SquaresHandle
    from gguf_run.models.protocol import Op, Program


@frozen
class Observed:
    """Sums of squares of the columns of an input that some matrices share."""

    names: tuple[str, ...]  # tensors of the matrices
    squares: "SquaresHandle"


class Step(Generic[Table, Weight, Vector, Cache, Experts, Squares, State]):
    """Builds the lists of ops of one backend: the parts of its program, and the ops for the wanted rows.

    A weight is loaded when its op is listed. All layers use the same buffers. x is the residual stream.
    """

    def __init__(
        self,
        load: Loader[Table, Weight, Vector, Cache, Experts, Squares, State],
        config: ModelConfig,
        observed: list[Observed] | None,
    ) -> None:
        """observed: a list that gets an entry for the input of every matmul; None: nothing is observed."""
        self.load, self.config, self._observed = load, config, observed
        self.parts: list[list[Op[Table, Weight, Vector, Cache, Experts, Squares, State]]] = []
        self.after: list[Op[Table, Weight, Vector, Cache, Experts, Squares, State]] = []
        self._ops = self.after  # the list that grows
        self._result = self.x = Buffer.whole("x", config.n_embd)
        self.name_buffers(outputs=False)

    def name_buffers(self, *, outputs: bool) -> None:
        """Name the buffers beside x. outputs: those of the wanted rows."""
        config = self.config
        self._qkv = buffer("qkv", config.n_embd_q + 2 * config.n_embd_kv, outputs)
        self._attn, self._h = buffer("attn", config.n_embd_q, outputs), buffer("h", config.n_embd, outputs)
        self._ff = buffer("ff", max(config.n_ff, config.n_ff_shexp), outputs)
        self._router, self._gate = buffer("router", config.n_expert, outputs), buffer("gate", 1, outputs)

    def new_part(self) -> None:
        """Begin a new part. The following ops belong to it."""
        self._ops = []
        self.parts.append(self._ops)

    def add(self, op: "Op[Table, Weight, Vector, Cache, Experts, Squares, State]") -> None:
        """Append an op to the list that grows."""
        self._ops.append(op)

    def embed(self) -> None:
        """x = embeddings of the tokens"""
        self.add(ops.Embed(self.load.embeddings(), self.x, self.config.embd_scale))

    def layer(self, il: int, cache: CacheLayer[Cache, State], *, experts: bool) -> None:
        """x += attention(norm(x)), then x += ffn(norm(x)). In a parallel layer, both read the first norm(x).

        A layer may have a mixer in place of attention or beside it, and may lack attention or ffn.

        experts: False if the layer's experts are on another backend. Its Step then adds them by the method `experts`.
        """
        arch, mixer, layer, block = self.config.arch, self.config.mixer, self.config.layers[il], f"blk.{il}."
        is_parallel = "ffn_norm" in arch.optional_norms and not self.load.has(f"{block}ffn_norm")
        if layer.n_head or (mixer is not None and mixer.states(il)):
            h = self.normed(block, "attn_norm")
            if mixer is None or not mixer.add(self, il, h, cache):
                self.project(il, h)
                if is_parallel:
                    self.ffn(il, h, experts)
                self.attend(il, cache)
        if experts and il == self.config.n_own - 1 and self._observed is None:
            self.only_outputs()
        if not is_parallel and (layer.n_ff or layer.has_experts):
            self.ffn(il, self.normed(block, arch.ffn_norm), experts)

    def project(self, il: int, h: Buffer) -> None:
        """qkv = q, k and v of h, side by side"""
        self.matmul(h, self.load.qkv(self.config.arch, f"blk.{il}."), self._qkv)

    def attend(self, il: int, cache: CacheLayer[Cache, State]) -> None:
        """x += attention of what `project` made"""
        self.attention(il, cache, self._qkv)

    def attention(self, il: int, cache: CacheLayer[Cache, State], qkv: Buffer, gate: Buffer | None = None) -> None:
        """x += attention of q, k and v, which stand side by side. gate: attention is multiplied by its sigmoid."""
        config, layer, block = self.config, self.config.layers[il], f"blk.{il}."
        n_q, n_kv, head_dim = layer.n_embd_q, layer.n_embd_kv, layer.head_dim
        q, k, v = qkv.columns(0, n_q), qkv.columns(n_q, n_kv), qkv.columns(n_q + n_kv, n_kv)
        norms = ((q, "attn_q_norm", layer.n_head), (k, "attn_k_norm", layer.n_head_kv))
        is_late = config.arch.qk_norm_after_rope
        for part, name, n_head in norms:
            if self._has_norm(block, name) and not is_late:
                self.norm(part, block + name, part, n_group=n_head if config.arch.norm_per_head else 1, inner=True)
        assert cache.cache is not None
        if config.temperature is not None and not (config.arch.temperature and layer.n_rot):
            from gguf_run.models.rare_ops import Temper  # late: few models need it

            self.add(Temper(q, config.temperature))
        if cache.rotation is not None:
            self.add(ops.Rope(qkv.columns(0, n_q + n_kv), cache.rotation, head_dim))
        if is_late and layer.n_rot:
            from gguf_run.models.made_weights import late_norms

            for weight, (part, _, n_head) in zip(late_norms(self.load, block, head_dim), norms, strict=True):
                self.add(ops.RmsNorm(part, weight, part, config.inner_eps, n_head))
        sinks = self.load.vector(f"{block}attn_sinks")
        out = self._attn.columns(0, n_q)
        self.add(ops.Attend(q, k, v, cache.cache, config.attention(il), out, sinks))
        if gate is not None:
            self.add(ops.Gated(gate, out, out, "sigmoid"))
        self.add_product(out, block, "attn_output", "post_attention_norm")

    def before(self, il: int) -> tuple[Buffer, ...]:
        """Return the buffers that layer il needs, or the output if there is no such layer: x."""
        return (self.x,)

    @property
    def to_experts(self) -> tuple[Buffer, ...]:
        """The buffers that `experts` needs: x, the experts' input, and the router's logits."""
        return self.x, self._h, self._router

    def experts(self, il: int) -> None:
        """x += the weighted results of the experts that the router's logits choose"""
        self.moe(il, self.x)

    def moe(self, il: int, out: Buffer, *, accumulate: bool = True) -> None:
        """out (+)= the weighted results of the experts that the router's logits choose"""
        from gguf_run.models.experts import moe_op  # late: most models have no experts

        self.add(moe_op(self, il, self._h, self._router, out, accumulate))

    def only_outputs(self) -> None:
        """List the following ops in `after`, for the wanted rows only. x is copied, other buffers are new."""
        self._ops = self.after
        self.x = self.wanted(self.x)
        self.name_buffers(outputs=True)

    def wanted(self, x: Buffer) -> Buffer:
        """Return a buffer that gets the wanted rows of x."""
        self.add(ops.Outputs(x, out := buffer(x.name, x.width, outputs=True)))
        return out

    def hidden(self) -> None:
        """result = norm(x)"""
        if not self.after:
            self.only_outputs()
        self.norm(self.x, self.config.arch.output_norm, self._h)
        self._result = self._h

    def logits(self) -> None:
        """result = logits = softcap(output(norm(x)))"""
        self.hidden()
        config, is_tied = self.config, not self.load.has("output")
        self._result = logits = Buffer.whole("logits", config.n_vocab, outputs=True)
        output = self.load.matrix("token_embd" if is_tied else "output", bias=["output"])
        self.matmul(self._h, output, logits)
        if config.logit_scale != 1 or config.final_softcap:
            from gguf_run.models.rare_ops import Softcap

            self.add(Softcap(logits, config.logit_scale, config.final_softcap))

    def program(self, n_batch: int, n_outputs: int) -> "Program":
        """Return the program of all ops so far. See Backend.program."""
        return self.load.backend.program(self.parts, self.after, self._result, n_batch, n_outputs)

    def ffn(self, il: int, h: Buffer, experts: bool) -> None:
        """x += down(activation(gate(h)) * up(h)), or the results of the experts, or both"""
        config, block = self.config, f"blk.{il}."
        if config.layers[il].has_experts:
            self.matmul(h, self.load.matrix(f"{block}ffn_gate_inp"), self._router)
            if experts:
                self.experts(il)
        if names := config.ffn(il):
            self.add_product(self.gated(il, h), block, names[-1], "post_ffw_norm")

    def gated(self, il: int, h: Buffer) -> Buffer:
        """Return activation(gate(h)) * up(h) of layer il's ffn, in a buffer that its experts do not use."""
        config, load, block = self.config, self.load, f"blk.{il}."
        *into, _ = config.ffn(il)
        gate_up, activation = load.matrix(*(block + name for name in into)), config.arch.activation
        width = gate_up.weight.n_out // (2 if config.arch.gated else 1)
        ff = self._ff.columns(0, width)
        if config.arch.gated:
            self._observe(h, gate_up)
            self.add(ops.MatmulGated(h, gate_up.weight, ff, activation, gate_up.bias))
        else:
            self.matmul(h, gate_up, ff)
            if config.xielu:
                from gguf_run.models.rare_ops import Xielu

                self.add(Xielu(ff, ff, *config.xielu[il]))
            else:
                self.add(ops.Gated(ff, None, ff, activation))
        if config.layers[il].has_experts and config.arch.shared_gate:
            self.matmul(h, load.matrix(f"{block}ffn_gate_inp_shexp"), self._gate)
            from gguf_run.models.rare_ops import GateRows

            self.add(GateRows(ff, self._gate))
        return ff

    def _has_norm(self, block: str, name: str) -> bool:
        return name in self.config.arch.norms and self.load.has(block + name)

    def normed(self, block: str, name: str) -> Buffer:
        """Return the input of attention or ffn: norm(x), or x if the layer does not have that norm."""
        if not self._has_norm(block, name):
            return self.x
        self.norm(self.x, block + name, self._h)
        return self._h

    def norm(
        self,
        x: Buffer,
        name: str,
        out: Buffer,
        n_group: int = 1,
        residual: Buffer | None = None,
        *,
        inner: bool = False,
    ) -> None:
        """out = norm(x) (+ residual). inner: x is not the residual stream."""
        eps, (weight, bias) = self.config.inner_eps if inner else self.config.rms_eps, self.load.norm(name)
        if self.config.arch.layer_norm:
            assert residual is None
            from gguf_run.models.rare_ops import LayerNorm

            self.add(LayerNorm(x, weight, bias, out, eps, n_group))
        else:
            self.add(ops.RmsNorm(x, weight, out, eps, n_group, residual))

    def matmul(self, x: Buffer, matrix: Matrix[Weight, Vector], out: Buffer, residual: Buffer | None = None) -> None:
        self._observe(x, matrix)
        self.add(ops.Matmul(x, matrix.weight, out, matrix.bias, residual))

    def _observe(self, x: Buffer, matrix: Matrix[Weight, Vector]) -> None:
        if (squares := self.squares(matrix.names, x.width)) is not None:
            self.add(ops.Observe(x, squares))

    def squares(self, names: tuple[str, ...], width: int, n_expert: int = 1) -> Squares | None:
        """Return sums of squares of what the matrices of some tensors read, None if nothing is observed."""
        if self._observed is None:
            return None
        squares = self.load.backend.squares(width, n_expert)
        self._observed.append(Observed(names, squares))
        return squares

    def add_product(self, y: Buffer, block: str, name: str, post_norm: str) -> None:
        """x += matrix @ y, or x += norm(matrix @ y) if the layer has post_norm

        An architecture may use the tensors of post_norm for the norm before the ffn. Then the product is not normed.
        """
        matrix = self.load.matrix(block + name)
        if post_norm == self.config.arch.ffn_norm or not self._has_norm(block, post_norm):
            self.matmul(y, matrix, self.x, residual=self.x)
        else:
            self.matmul(y, matrix, self._h)
            self.norm(self._h, block + post_norm, self.x, residual=self.x)


def buffer(name: str, width: int, outputs: bool) -> Buffer:
    """Return a buffer for all rows, or one for the wanted rows."""
    return Buffer.whole(f"{name}{'_out' * outputs}", width, outputs=outputs)


def step_class(config: ModelConfig) -> type[Step[Any, Any, Any, Any, Any, Any, Any]]:
    """Return the class that lists the ops of a model's steps."""
    if not config.arch.step:
        return Step
    found: type[Step[Any, Any, Any, Any, Any, Any, Any]] = import_module(f"gguf_run.models.{config.arch.step}").Step
    return found
