"""A llama in torch to train: the names and the rotation of Hugging Face's, so that gguf-convert reads what it saves."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Sizes of a llama whose embeddings are the output matrix too."""

    n_vocab: int
    n_layer: int = 6
    n_embd: int = 512
    n_head: int = 8
    n_head_kv: int = 4
    n_ff: int = 1536
    n_ctx: int = 512
    rope_freq_base: float = 10000.0
    eps: float = 1e-5

    def config(self) -> Mapping[str, Any]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": self.n_vocab,
            "hidden_size": self.n_embd, "intermediate_size": self.n_ff, "num_hidden_layers": self.n_layer,
            "num_attention_heads": self.n_head, "num_key_value_heads": self.n_head_kv, "rms_norm_eps": self.eps,
            "max_position_embeddings": self.n_ctx, "rope_theta": self.rope_freq_base, "tie_word_embeddings": True,
            "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
        }  # fmt: skip


class Llama(nn.Module):
    """The layers. Matrices are [n_out, n_in]; forward takes ids [batch, length] and returns hidden states."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        n, kv = shape.n_embd, shape.n_embd // shape.n_head * shape.n_head_kv
        sizes = {
            "self_attn.q_proj": (n, n), "self_attn.k_proj": (kv, n), "self_attn.v_proj": (kv, n),
            "self_attn.o_proj": (n, n), "mlp.gate_proj": (shape.n_ff, n), "mlp.up_proj": (shape.n_ff, n),
            "mlp.down_proj": (n, shape.n_ff), "input_layernorm": (n,), "post_attention_layernorm": (n,),
        }  # fmt: skip
        named = {f"model.layers.{i}.{name}.weight": size for i in range(shape.n_layer) for name, size in sizes.items()}
        named |= {"model.embed_tokens.weight": (shape.n_vocab, n), "model.norm.weight": (n,)}
        self.names = {name: name.replace(".", "_") for name in named}
        for name, size in named.items():
            start = torch.ones(size) if len(size) == 1 else 0.02 * torch.randn(size)
            self.register_parameter(self.names[name], nn.Parameter(start))
        dim = n // shape.n_head
        angle = torch.arange(shape.n_ctx)[:, None] * shape.rope_freq_base ** (-torch.arange(0, dim, 2) / dim)
        self.register_buffer("cos", torch.cat([angle.cos()] * 2, 1), persistent=False)
        self.register_buffer("sin", torch.cat([-angle.sin(), angle.sin()], 1), persistent=False)

    def weight(self, name: str) -> Tensor:
        return self.get_parameter(self.names[name])

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take weights by Hugging Face's names."""
        with torch.no_grad():
            for name in self.names:
                self.weight(name).copy_(tensors[name])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight(name).to(x.dtype), self.shape.eps)

    def _rotated(self, x: Tensor) -> Tensor:
        length, half = x.shape[-2], x.shape[-1] // 2
        turned = torch.cat([x[..., half:], x[..., :half]], -1)
        return x * self.cos[:length].to(x.dtype) + turned * self.sin[:length].to(x.dtype)

    def _attention(self, x: Tensor, layer: str) -> Tensor:
        batch, length, n = x.shape
        heads = {}
        for part, n_head in (("q", self.shape.n_head), ("k", self.shape.n_head_kv), ("v", self.shape.n_head_kv)):
            y = F.linear(x, self.weight(f"{layer}.self_attn.{part}_proj.weight"))
            heads[part] = y.view(batch, length, n_head, -1).transpose(1, 2)
        q, k = self._rotated(heads["q"]), self._rotated(heads["k"])
        y = F.scaled_dot_product_attention(q, k, heads["v"], is_causal=True, enable_gqa=True)
        return F.linear(y.transpose(1, 2).reshape(batch, length, n), self.weight(f"{layer}.self_attn.o_proj.weight"))

    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.weight("model.embed_tokens.weight"))
        for i in range(self.shape.n_layer):
            layer = f"model.layers.{i}"
            x = x + self._attention(self._norm(x, f"{layer}.input_layernorm.weight"), layer)
            y = self._norm(x, f"{layer}.post_attention_layernorm.weight")
            gate, up = (F.linear(y, self.weight(f"{layer}.mlp.{part}_proj.weight")) for part in ("gate", "up"))
            x = x + F.linear(F.silu(gate) * up, self.weight(f"{layer}.mlp.down_proj.weight"))
        return self._norm(x, "model.norm.weight")

    def logits(self, ids: Tensor) -> Tensor:
        """[batch, length, n_vocab]"""
        return F.linear(self(ids), self.weight("model.embed_tokens.weight"))

    def save(self, folder: Path) -> None:
        """Write config.json and the weights as bfloat16."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.shape.config(), indent=1))
        tensors = {name: self.weight(name).detach().to(torch.bfloat16).contiguous() for name in self.names}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
