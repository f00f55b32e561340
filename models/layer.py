"""One layer: its weights in a backend's form, how they are loaded, and the ops that it records."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models.architectures import EXPERTS, ROPE_FACTORS
from gguf_run.models.backend import Attention, Backend, Buffer, Recorder, Rope, Squares, Weight
from gguf_run.models.config import ModelConfig
from gguf_run.models.rope import UNSCALED, make_rope


@dataclass(frozen=True)
class Matrix:
    """What one matmul reads: the rows of the tensors `names`, and their biases (None if the model has none)."""

    names: tuple[str, ...]
    weight: Weight
    bias: Any


@dataclass(frozen=True)
class Norm:
    weight: Any
    bias: Any


@dataclass(frozen=True)
class Layer:
    """One layer's weights in its backend's form; None for what the model does not have.

    ffn_gate_up, ffn_down: of the one ffn, or of the expert that all tokens share, whose output ffn_gate_shexp weighs.
    parallel: attention and ffn read the same normed values.
    """

    attn_norm: Norm | None
    attn_qkv: Matrix
    attn_q_norm: Norm | None
    attn_k_norm: Norm | None
    attn_sinks: Any
    attn_output: Matrix
    post_attention_norm: Norm | None
    ffn_norm: Norm | None
    parallel: bool
    ffn_gate_inp: Matrix | None
    experts: Any
    ffn_gate_shexp: Matrix | None
    ffn_gate_up: Matrix | None
    ffn_down: Matrix | None
    post_ffw_norm: Norm | None
    attention: Attention
    cache: Any
    rope: Rope | None


@dataclass(frozen=True)
class Observed:
    """The input that the matrices `names` share."""

    names: tuple[str, ...]
    squares: Squares


class Loader:
    """Takes tensors by name out of the file and into one backend, and reports the bytes."""

    def __init__(self, tensors: Mapping[str, Tensor], progress: Callable[[int], None] | None) -> None:
        self.tensors = tensors
        self.progress = progress or (lambda n_bytes: None)

    def take(self, upload: Callable[[list[Tensor]], Any], names: Sequence[str]) -> Any:
        """None if the file has none of the tensors (it has all or none, see config)."""
        taken = [self._scaled(name) for name in names if name in self.tensors]
        if not taken:
            return None
        handle = upload(taken)
        for tensor in taken:
            tensor.release()
            self.progress(tensor.nbytes)
        return handle

    def _scaled(self, name: str) -> Tensor:
        """The tensor, with the factors that another tensor holds for it."""
        tensor, factors = self.tensors[name], self.tensors.get(f"{name.removesuffix('.weight')}.scale")
        if factors is None or not name.endswith(".weight"):
            return tensor
        if factors.type.name != "F32" or factors.n_elements != math.prod(tensor.ne[2:]):
            raise FormatError(
                f"tensor {quoted(factors.name)} has {factors.n_elements} values of {factors.type.name}, must have one "
                f"F32 for each matrix of {quoted(name)}"
            )
        return replace(tensor, scales=tuple(factors.blocks().reshape(-1).view(np.float32).tolist()))

    def matrix(self, backend: Backend, *names: str, bias: Sequence[str] | None = None) -> Matrix:
        """bias: whose biases, if not those of `names`."""
        weights = tuple(f"{name}.weight" for name in names)
        biases = [f"{name}.bias" for name in (bias or names)]
        return Matrix(weights, self.take(backend.weight, weights), self.take(backend.vector, biases))

    def norm(self, backend: Backend, name: str) -> Norm | None:
        weight = self.take(backend.vector, [f"{name}.weight"])
        return None if weight is None else Norm(weight, self.take(backend.vector, [f"{name}.bias"]))

    def layer(
        self, backend: Backend, experts_on: Backend, config: ModelConfig, il: int, rope: Rope | None, cache: Any
    ) -> Layer:
        arch, block = config.arch, f"blk.{il}."

        def matrix(*names: str) -> Matrix | None:
            there = names and f"{block}{names[0]}.weight" in self.tensors
            return self.matrix(backend, *(block + name for name in names)) if there else None

        qkv, output = matrix(*arch.qkv), matrix("attn_output")
        assert qkv is not None
        assert output is not None  # config has checked it
        norms = {name: self.norm(backend, block + name) for name in arch.norms}
        gate_up, down = config.ffn(il)
        experts = [f"{block}{name}.{part}" for part in ("weight", "bias") for name in EXPERTS]
        after = {name: norm for name, norm in norms.items() if name != arch.ffn_norm}
        return Layer(
            attn_norm=norms.get("attn_norm"),
            attn_qkv=qkv,
            attn_q_norm=norms.get("attn_q_norm"),
            attn_k_norm=norms.get("attn_k_norm"),
            attn_sinks=self.take(backend.vector, [f"{block}attn_sinks.weight"]),
            attn_output=output,
            post_attention_norm=after.get("post_attention_norm"),
            ffn_norm=norms.get(arch.ffn_norm),
            parallel="ffn_norm" in arch.optional_norms and norms["ffn_norm"] is None,
            ffn_gate_inp=matrix("ffn_gate_inp"),
            experts=self.take(experts_on.experts, experts),
            ffn_gate_shexp=matrix("ffn_gate_inp_shexp"),
            ffn_gate_up=matrix(*gate_up),
            ffn_down=matrix(down),
            post_ffw_norm=norms.get("post_ffw_norm"),
            attention=config.attention(il),
            cache=cache,
            rope=rope,
        )

    def ropes(self, config: ModelConfig, n_ctx: int) -> list[Rope | None]:
        """How each layer turns. Layers that turn alike have one object: backends keep one table of angles for it."""
        arch, scaling = config.arch, config.rope_scaling
        name = ROPE_FACTORS[0] if ROPE_FACTORS[0] in self.tensors else ROPE_FACTORS[2 - (n_ctx > scaling.n_ctx_orig)]
        factors = self._factors(name) if arch.rope_factors and name in self.tensors else None
        base, base_swa = config.rope_freq_base, config.rope_freq_base_swa
        rope = rope_swa = make_rope(arch.rope_style, config.n_rot, base, scaling, factors)
        if base != base_swa or not arch.swa_rope_scaled:
            scaling = scaling if arch.swa_rope_scaled else UNSCALED
            rope_swa = make_rope(arch.rope_style, config.n_rot, base_swa, scaling)
        rotating = [config.has_rope(il) for il in range(config.n_layer)]
        return [(rope_swa if config.is_swa[il] else rope) if turns else None for il, turns in enumerate(rotating)]

    def _factors(self, name: str) -> NDArray[np.float32]:
        """Return what each rotary frequency is divided by."""
        tensor = self.tensors[name]
        if tensor.type.name != "F32":
            raise UnsupportedError(f"tensor {name} has the type {tensor.type.name}, must be F32")
        factors = tensor.blocks().reshape(-1).view(np.float32)
        if not (np.isfinite(factors) & (factors > 0)).all():
            raise FormatError(f"tensor {name} has values that are not positive numbers")
        return factors


class Step:
    """Records the ops of a step. h and the other buffers are shared by all layers of a stage."""

    def __init__(self, recorder: Recorder, config: ModelConfig, observed: list[Observed] | None) -> None:
        """observed: gets the input of every matmul, None if nothing is to be observed."""
        self.rec, self.config, self.observed = recorder, config, observed
        self.x = recorder.buffer(config.n_embd)
        self.qkv = recorder.buffer(config.n_embd_q + 2 * config.n_embd_kv)
        self.attn = recorder.buffer(config.n_embd_q)
        self._buffers()

    def _buffers(self) -> None:
        """What shrinks when only outputs are left."""
        config, recorder = self.config, self.rec
        self.h = recorder.buffer(config.n_embd)
        self.ff = recorder.buffer(max(config.n_ff, config.n_ff_shexp))
        self.logits = recorder.buffer(config.n_expert) if config.n_expert else None
        self.gate = recorder.buffer(1) if config.arch.shared_gate else None

    def norm(self, x: Buffer, norm: Norm, out: Buffer, n_group: int = 1, residual: Buffer | None = None) -> None:
        """n_group: parts of a row that are normed by themselves."""
        if self.config.arch.layer_norm:
            assert residual is None
            self.rec.layer_norm(x, norm.weight, norm.bias, out, self.config.rms_eps, n_group=n_group)
        else:
            self.rec.rms_norm(x, norm.weight, out, self.config.rms_eps, n_group=n_group, residual=residual)

    def _normed(self, norm: Norm | None) -> Buffer:
        """What attention or the ffn reads."""
        if norm is None:
            return self.x
        self.norm(self.x, norm, self.h)
        return self.h

    def attention(self, layer: Layer) -> None:
        """x += attention(norm(x))"""
        rec, config, qkv = self.rec, self.config, self.qkv
        n_q, n_kv, head_dim = config.n_embd_q, config.n_embd_kv, config.head_dim
        q, k, v = qkv.columns(0, n_q), qkv.columns(n_q, n_kv), qkv.columns(n_q + n_kv, n_kv)
        h = self._normed(layer.attn_norm)
        self.matmul(h, layer.attn_qkv, qkv)
        if layer.parallel:
            self._ffn(layer, h)
        for part, norm, n_head in ((q, layer.attn_q_norm, config.n_head), (k, layer.attn_k_norm, config.n_head_kv)):
            if norm is not None:
                self.norm(part, norm, part, n_group=n_head if config.arch.norm_per_head else 1)
        if layer.rope is not None:
            rec.rope(qkv.columns(0, n_q + n_kv), layer.rope, head_dim)
        rec.attention(q, k, v, layer.cache, layer.attention, self.attn, sinks=layer.attn_sinks)
        self._add(self.attn, layer.attn_output, layer.post_attention_norm)

    def only_outputs(self) -> None:
        """From here on only the rows whose logits are wanted: their residual stream is copied, the rest shrinks."""
        self.x = self.rec.outputs(self.x)
        self._buffers()

    def ffn(self, layer: Layer, experts: bool = True) -> None:
        """x += down(activation(gate(norm(x))) * up(norm(x))), for the layer's one ffn or for some experts. experts:
        False if another backend has them: `experts` follows there, and reads `to_experts`."""
        if not layer.parallel:
            self._ffn(layer, self._normed(layer.ffn_norm), experts)

    @property
    def to_experts(self) -> tuple[Buffer, ...]:
        """x, which experts are added to, what they read, and the router's logits."""
        assert self.logits is not None
        return self.x, self.h, self.logits

    def experts(self, layer: Layer) -> None:
        """x += the experts' part of the ffn, of h as the router's logits say"""
        assert layer.ffn_gate_inp is not None
        _, h, logits = self.to_experts
        squares = self.rec.moe(h, logits, layer.experts, self.config.moe, self.x, observe=self.observed is not None)
        if self.observed is not None and squares is not None:
            block = layer.ffn_gate_inp.names[0].removesuffix("ffn_gate_inp.weight")
            *first, last = (f"{block}{name}.weight" for name in EXPERTS)
            self.observed += [Observed(tuple(first), squares[0]), Observed((last,), squares[1])]

    def _ffn(self, layer: Layer, h: Buffer, experts: bool = True) -> None:
        rec, activation = self.rec, self.config.arch.activation
        if layer.ffn_gate_inp is not None:
            assert self.logits is not None
            self.matmul(h, layer.ffn_gate_inp, self.logits)
            if experts:
                self.experts(layer)
        if layer.ffn_gate_up is None or layer.ffn_down is None:
            return
        ff = self.ff.columns(0, layer.ffn_down.weight.n_in)
        if self.config.arch.gated:
            self._observe(h, layer.ffn_gate_up)
            rec.matmul_gated(h, layer.ffn_gate_up.weight, ff, activation, bias=layer.ffn_gate_up.bias)
        else:
            self.matmul(h, layer.ffn_gate_up, ff)
            rec.gated(ff, None, ff, activation)
        if layer.ffn_gate_shexp is not None and self.gate is not None:
            self.matmul(h, layer.ffn_gate_shexp, self.gate)
            rec.gate_rows(ff, self.gate)
        self._add(ff, layer.ffn_down, layer.post_ffw_norm)

    def output(self, norm: Norm, matrix: Matrix) -> Buffer:
        """Return the logits."""
        self.norm(self.x, norm, self.h)
        logits = self.rec.buffer(self.config.n_vocab)
        self.matmul(self.h, matrix, logits)
        if self.config.logit_scale != 1 or self.config.final_softcap:
            self.rec.softcap(logits, self.config.logit_scale, self.config.final_softcap)
        return logits

    def _observe(self, x: Buffer, matrix: Matrix) -> None:
        if self.observed is not None:
            self.observed.append(Observed(matrix.names, self.rec.observe(x)))

    def matmul(self, x: Buffer, matrix: Matrix, out: Buffer, residual: Buffer | None = None) -> None:
        self._observe(x, matrix)
        self.rec.matmul(x, matrix.weight, out, bias=matrix.bias, residual=residual)

    def _add(self, y: Buffer, matrix: Matrix, post_norm: Norm | None) -> None:
        """x += matrix @ y, normed first where the architecture says so."""
        if post_norm is None:
            self.matmul(y, matrix, self.x, residual=self.x)
        else:
            self.matmul(y, matrix, self.h)
            self.norm(self.h, post_norm, self.x, residual=self.x)
