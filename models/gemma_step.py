"""The ops of Gemma 4: tokens have an embedding for each layer too, layers share keys and values, experts have norms.

E is n_embd, P the width of an embedding for a layer (n_ple), L the number of layers.
"""

import numpy as np

from gguf_run.models import made_weights, ops, rare_ops, step
from gguf_run.models.architectures import QKV
from gguf_run.models.kv_cache import CacheLayer
from gguf_run.models.operands import Buffer
from gguf_run.models.ops import Cache, Experts, Squares, State, Table, Vector, Weight


class Step(step.Step[Table, Weight, Vector, Cache, Experts, Squares, State]):
    """step.Step of these models."""

    def name_buffers(self, *, outputs: bool) -> None:
        super().name_buffers(outputs=outputs)
        config = self.config
        if not outputs:
            self._ple = Buffer.whole("ple", config.n_ple * config.n_layer)
        self._gate_in = step.buffer("ple_gate", config.n_ple, outputs)
        self._sum, self._dense = (step.buffer(name, config.n_embd, outputs) for name in ("sum", "dense"))

    def embed(self) -> None:
        """x = embeddings of the tokens; ple = their embeddings for all layers, times sqrt(P / 2)"""
        super().embed()
        if self.config.has_ple:
            table = self.load.table("per_layer_token_embd.weight")
            self.add(ops.Embed(table, self._ple, (self.config.n_ple / 2) ** 0.5))

    def before(self, il: int) -> tuple[Buffer, ...]:
        return (self.x, self._ple) if self.config.has_ple else (self.x,)

    @property
    def to_experts(self) -> tuple[Buffer, ...]:
        return (*super().to_experts, self._dense, *self.before(0)[1:])

    def layer(self, il: int, cache: CacheLayer[Cache, State], *, experts: bool) -> None:
        self.begin(il)
        super().layer(il, cache, experts=experts)
        if not self.config.layers[il].has_experts:
            self.finish(il)

    def project(self, il: int, h: Buffer) -> None:
        layer, block = self.config.layers[il], f"blk.{il}."
        made = [name for name in QKV if name == "attn_q" or layer.kv_layer == il]
        matrix = self.load.matrix(*(block + name for name in made if self.load.has(block + name)))
        self.matmul(h, matrix, self._qkv.columns(0, matrix.weight.n_out))

    def attend(self, il: int, cache: CacheLayer[Cache, State]) -> None:
        """x += norm(attention). Heads of q and k are normed, those of v too, without weights; v may be made of k."""
        config, layer, block = self.config, self.config.layers[il], f"blk.{il}."
        n_q, n_kv, n_head_kv, eps = layer.n_embd_q, layer.n_embd_kv, layer.n_head_kv, config.inner_eps
        q, both, k, v = self._qkv.columns(0, n_q), self._qkv.columns(0, n_q), None, None
        if layer.kv_layer == il:
            k, v = self._qkv.columns(n_q, n_kv), self._qkv.columns(n_q + n_kv, n_kv)
            both = self._qkv.columns(0, n_q + n_kv)
            ones = made_weights.numbers(self.load, f"{block}attn_v", np.ones(layer.head_dim, np.float32))
            self.add(ops.RmsNorm(v if self.load.has(f"{block}attn_v") else k, ones, v, eps, n_head_kv))
        self.norm(q, f"{block}attn_q_norm", q, layer.n_head, inner=True)
        if k is not None:
            self.norm(k, f"{block}attn_k_norm", k, n_head_kv, inner=True)
        assert cache.cache is not None
        assert cache.rotation is not None
        self.add(ops.Rope(both, cache.rotation, layer.head_dim))
        attn = self._attn.columns(0, n_q)
        self.add(ops.Attend(q, k, v, cache.cache, config.attention(il), attn))
        self.add_product(attn, block, "attn_output", "post_attention_norm")

    def begin(self, il: int) -> None:
        """Before layer 0: ple += norm(projection(x / sqrt(E))) / sqrt(2), each layer's part by itself."""
        config = self.config
        if il or not config.has_ple:
            return
        projected = Buffer.whole("ple_projected", config.n_ple * config.n_layer)
        self.matmul(self.x, self.load.matrix("per_layer_model_proj"), projected)
        name = "per_layer_proj_norm.weight"
        weight = made_weights.numbers(self.load, name, made_weights.values(self.load, name) * np.float32(0.5**0.5))
        eps = config.rms_eps * config.n_embd
        self.add(ops.RmsNorm(projected, weight, self._ple, eps, config.n_layer, self._ple))

    def only_outputs(self) -> None:
        super().only_outputs()
        if self.config.has_ple:
            self._ple = self.wanted(self._ple)

    def ffn(self, il: int, h: Buffer, experts: bool) -> None:
        """x += norm(norm(dense ffn) + norm(experts)). Each has a norm of x of its own, and so has the router."""
        config, load, block = self.config, self.load, f"blk.{il}."
        if not config.layers[il].has_experts:
            super().ffn(il, h, experts)
            return
        self.matmul(self.gated(il, h), load.matrix(f"{block}ffn_down"), self._h)
        self.norm(self._h, f"{block}post_ffw_norm_1", self._dense)
        name = f"{block}ffn_gate_inp.scale"
        scale = made_weights.numbers(load, name, made_weights.values(load, name) * np.float32(config.n_embd**-0.5))
        self.add(ops.RmsNorm(self.x, scale, self._h, config.rms_eps))
        self.matmul(self._h, load.matrix(f"{block}ffn_gate_inp"), self._router)
        self.norm(self.x, f"{block}pre_ffw_norm_2", self._h)
        if experts:
            self.experts(il)

    def experts(self, il: int) -> None:
        block = f"blk.{il}."
        self.moe(il, self._sum, accumulate=False)
        self.norm(self._sum, f"{block}post_ffw_norm_2", self._dense, residual=self._dense)
        self.norm(self._dense, f"{block}post_ffw_norm", self.x, residual=self.x)
        self.finish(il)

    def finish(self, il: int) -> None:
        """x = scale * (x + norm(proj(gelu(gate(x)) * the layer's part of ple)))"""
        config, block, gate = self.config, f"blk.{il}.", self._gate_in
        if config.has_ple:
            self.matmul(self.x, self.load.matrix(f"{block}inp_gate"), gate)
            self.add(ops.Gated(gate, self._ple.columns(il * config.n_ple, config.n_ple), gate, "gelu"))
            self.matmul(gate, self.load.matrix(f"{block}proj"), self._h)
            self.norm(self._h, f"{block}post_norm", self.x, residual=self.x)
        if self.load.has(f"{block}layer_output_scale"):
            scale = made_weights.values(self.load, f"{block}layer_output_scale.weight")
            self.add(rare_ops.Softcap(self.x, float(scale[0]), 0.0))
