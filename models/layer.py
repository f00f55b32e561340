"""One layer: its weights in a backend's form, how they are loaded, and the ops that it records."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf_run.formats.reader import Tensor
from gguf_run.models.backend import Attention, Backend, Buffer, Recorder, Rope, Squares, Weight
from gguf_run.models.config import ModelConfig


@dataclass(frozen=True)
class Matrix:
    """What one matmul reads: the rows of the tensors `names`, and their biases (None if the model has none)."""

    names: tuple[str, ...]
    weight: Weight
    bias: Any


@dataclass(frozen=True)
class Layer:
    """One layer's weights in its backend's form. Norms that the model does not have are None."""

    attn_norm: Any
    attn_qkv: Matrix
    attn_q_norm: Any
    attn_k_norm: Any
    attn_output: Matrix
    post_attention_norm: Any
    ffn_norm: Any
    ffn_gate_up: Matrix
    ffn_down: Matrix
    post_ffw_norm: Any
    attention: Attention
    cache: Any
    rope: Rope


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
        taken = [self.tensors[name] for name in names if name in self.tensors]
        if not taken:
            return None
        handle = upload(taken)
        for tensor in taken:
            tensor.release()
            self.progress(tensor.nbytes)
        return handle

    def matrix(self, backend: Backend, *names: str, bias: Sequence[str] | None = None) -> Matrix:
        """bias: whose biases, if not those of `names`."""
        weights = tuple(f"{name}.weight" for name in names)
        biases = [f"{name}.bias" for name in (bias or names)]
        return Matrix(weights, self.take(backend.weight, weights), self.take(backend.vector, biases))

    def norm(self, backend: Backend, name: str) -> Any:
        return self.take(backend.vector, [f"{name}.weight"])

    def layer(self, backend: Backend, config: ModelConfig, il: int, rope: Rope, cache: Any) -> Layer:
        arch, block = config.arch, f"blk.{il}"
        qkv, gate_up = [f"{block}.{name}" for name in arch.qkv], [f"{block}.{name}" for name in arch.gate_up]
        extra = {name: self.norm(backend, f"{block}.{name}") for name in arch.norms}
        return Layer(
            attn_norm=self.norm(backend, f"{block}.attn_norm"),
            attn_qkv=self.matrix(backend, *qkv),
            attn_q_norm=extra.get("attn_q_norm"),
            attn_k_norm=extra.get("attn_k_norm"),
            attn_output=self.matrix(backend, f"{block}.attn_output"),
            post_attention_norm=extra.get("post_attention_norm"),
            ffn_norm=self.norm(backend, f"{block}.ffn_norm"),
            ffn_gate_up=self.matrix(backend, *gate_up),
            ffn_down=self.matrix(backend, f"{block}.ffn_down"),
            post_ffw_norm=extra.get("post_ffw_norm"),
            attention=config.attention(il),
            cache=cache,
            rope=rope,
        )


class Step:
    """Records the ops of a step. h and the other buffers are shared by all layers of a stage."""

    def __init__(self, recorder: Recorder, config: ModelConfig, observed: list[Observed] | None) -> None:
        """observed: gets the input of every matmul, None if nothing is to be observed."""
        self.rec, self.config, self.observed = recorder, config, observed
        self.x = recorder.buffer(config.n_embd)
        self.h = recorder.buffer(config.n_embd)
        self.qkv = recorder.buffer(config.n_embd_q + 2 * config.n_embd_kv)
        self.attn = recorder.buffer(config.n_embd_q)
        self.ff = recorder.buffer(config.n_ff)

    def attention(self, layer: Layer) -> None:
        """x += attention(norm(x))"""
        rec, config, h, qkv = self.rec, self.config, self.h, self.qkv
        n_q, n_kv, head_dim, eps = config.n_embd_q, config.n_embd_kv, config.head_dim, config.rms_eps
        q, k, v = qkv.columns(0, n_q), qkv.columns(n_q, n_kv), qkv.columns(n_q + n_kv, n_kv)
        rec.rms_norm(self.x, layer.attn_norm, h, eps)
        self.matmul(h, layer.attn_qkv, qkv)
        if layer.attn_q_norm is not None:
            rec.rms_norm(q, layer.attn_q_norm, q, eps, n_group=config.n_head)
        if layer.attn_k_norm is not None:
            rec.rms_norm(k, layer.attn_k_norm, k, eps, n_group=config.n_head_kv)
        rec.rope(qkv.columns(0, n_q + n_kv), layer.rope, head_dim)
        rec.attention(q, k, v, layer.cache, layer.attention, self.attn)
        self._add(self.attn, layer.attn_output, layer.post_attention_norm)

    def only_outputs(self) -> None:
        """From here on only the rows whose logits are wanted: their residual stream is copied, the rest shrinks."""
        self.x = self.rec.outputs(self.x)
        self.h = self.rec.buffer(self.config.n_embd)
        self.ff = self.rec.buffer(self.config.n_ff)

    def ffn(self, layer: Layer) -> None:
        """x += down(activation(gate(norm(x))) * up(norm(x)))"""
        gate_up = layer.ffn_gate_up
        self.rec.rms_norm(self.x, layer.ffn_norm, self.h, self.config.rms_eps)
        self._observe(self.h, gate_up)
        self.rec.matmul_gated(self.h, gate_up.weight, self.ff, self.config.arch.activation, bias=gate_up.bias)
        self._add(self.ff, layer.ffn_down, layer.post_ffw_norm)

    def _observe(self, x: Buffer, matrix: Matrix) -> None:
        if self.observed is not None:
            self.observed.append(Observed(matrix.names, self.rec.observe(x)))

    def matmul(self, x: Buffer, matrix: Matrix, out: Buffer, residual: Buffer | None = None) -> None:
        self._observe(x, matrix)
        self.rec.matmul(x, matrix.weight, out, bias=matrix.bias, residual=residual)

    def _add(self, y: Buffer, matrix: Matrix, post_norm: Any) -> None:
        """x += matrix @ y, normed first where the architecture says so."""
        if post_norm is None:
            self.matmul(y, matrix, self.x, residual=self.x)
        else:
            self.matmul(y, matrix, self.h)
            self.rec.rms_norm(self.h, post_norm, self.x, self.config.rms_eps, residual=self.x)
