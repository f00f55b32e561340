"""Latent attention: all keys and values of a position are made from one short row, which is all that the cache holds.

The row is [c (n_latent columns) | kr (n_rot columns, rotated)], and all heads share it. A head's keys would be
[K c | kr], its values V c. Instead, K and V are multiplied with the queries and with the results, head by head:

    q' = [K^T qn | qr]                          of a query [qn | qr], qr rotated
    out = V (softmax(scale * q' . rows) @ c)

DeepSeek-V2, arXiv:2405.04434.
"""

from collections.abc import Sequence
from typing import Any

from gguf_run.formats.frozen import frozen
from gguf_run.models import made_weights, ops, rare_ops
from gguf_run.models.backend import BLOCK
from gguf_run.models.keys import Keys
from gguf_run.models.kv_cache import CacheLayer
from gguf_run.models.mixers import Shapes
from gguf_run.models.operands import Buffer
from gguf_run.models.rope_scaling import yarn_attention

_EPS = 1e-6  # of the norms of latent rows, whatever the file says of other norms: no key tells it


@frozen
class Latent:
    """Latent attention in all layers."""

    n_embd: int
    n_head: int
    n_nope: int  # columns of a query that are not rotated
    n_rot: int  # columns that follow, rotated
    n_latent: int
    n_value: int  # columns of a value
    n_q: int  # columns of the latent row of the queries; 0: queries are made of x
    is_merged: bool  # K and V are one tensor, as old programs wrote them

    @property
    def n_row(self) -> int:
        """Columns of a row of the cache, and of a head of q'."""
        return self.n_latent + self.n_rot

    def attends(self, il: int) -> bool:
        return True

    def states(self, il: int) -> Sequence[int]:
        return ()

    def tensors(self, il: int) -> tuple[Shapes, Shapes]:
        n_embd, n_latent, n_head, n_q = self.n_embd, self.n_latent, self.n_head, self.n_q
        n_query, n_values = n_head * (self.n_nope + self.n_rot), n_head * self.n_value
        found = {
            "attn_kv_a_mqa": (n_embd, self.n_row),
            "attn_kv_a_norm": (n_latent,),
            "attn_output": (n_values, n_embd),
        }
        if n_q:
            found |= {"attn_q_a": (n_embd, n_q), "attn_q_a_norm": (n_q,), "attn_q_b": (n_q, n_query)}
        else:
            found["attn_q"] = n_embd, n_query
        heads = {"attn_k_b": (self.n_nope, n_latent, n_head), "attn_v_b": (n_latent, self.n_value, n_head)}
        merged: Shapes = {"attn_kv_b.weight": (n_latent, n_head * self.n_nope + n_values)}
        named: Shapes = {f"{name}.weight": ne for name, ne in (found if self.is_merged else found | heads).items()}
        return (named | merged, {}) if self.is_merged else (named, merged)

    def add(self, step: Any, il: int, h: Buffer, cache: CacheLayer[Any, Any]) -> bool:
        load, block, n_query = step.load, f"blk.{il}.", self.n_nope + self.n_rot
        first = load.matrix(block + ("attn_q_a" if self.n_q else "attn_q"), f"{block}attn_kv_a_mqa")
        made = Buffer.whole("latents", first.weight.n_out)
        step.matmul(h, first, made)
        q, row = made.columns(0, made.width - self.n_row), made.columns(made.width - self.n_row, self.n_row)
        if self.n_q:
            low, q = q, Buffer.whole("queries", self.n_head * n_query)
            self._norm(step, low, f"{block}attn_q_a_norm")
            step.matmul(low, load.matrix(f"{block}attn_q_b"), q)
        c, kr = row.columns(0, self.n_latent), row.columns(self.n_latent, self.n_rot)
        self._norm(step, c, f"{block}attn_kv_a_norm")
        assert cache.rotation is not None
        assert cache.cache is not None
        step.add(ops.Rope(q.columns(self.n_nope, q.width - self.n_nope), cache.rotation, n_query))
        step.add(ops.Rope(kr, cache.rotation, self.n_rot))
        if step.config.temperature is not None:
            step.add(rare_ops.Temper(q, step.config.temperature))
        k_b, v_b = made_weights.of_heads(load, block, self.n_head, self.n_nope)
        sizes = {"absorbed": self.n_row, "attended": self.n_latent, "values": self.n_value}
        absorbed, attended, values = (Buffer.whole(name, self.n_head * n) for name, n in sizes.items())
        step.add(rare_ops.MatmulHeads(q, k_b, absorbed, self.n_head))
        shape = step.config.attention(il)
        step.add(ops.Attend(absorbed, row, c, cache.cache, shape, attended))
        step.add(rare_ops.MatmulHeads(attended, v_b, values, self.n_head))
        step.add_product(values, block, "attn_output", "post_attention_norm")
        return True

    def _norm(self, step: Any, x: Buffer, name: str) -> None:
        step.add(ops.RmsNorm(x, step.load.norm(name)[0], x, _EPS))


def read(keys: Keys) -> Latent:
    is_merged = keys.get("attention.key_length_mla") is None
    end = "" if is_merged else "_mla"
    n_query, n_value = (keys.integer(f"attention.{name}_length{end}") for name in ("key", "value"))
    n_rot, n_latent = keys.integer("rope.dimension_count"), keys.integer("attention.kv_lora_rank")
    if n_rot >= n_query:
        raise keys.wrong("rope.dimension_count", f"less than the length of a key, {n_query}")
    if n_latent % BLOCK:
        raise keys.wrong("attention.kv_lora_rank", f"a multiple of {BLOCK}")
    n_embd, n_head = keys.integer("embedding_length"), keys.integer("attention.head_count")
    n_q = keys.integer("attention.q_lora_rank", 0, low=0)
    return Latent(n_embd, n_head, n_query - n_rot, n_rot, n_latent, n_value, n_q, is_merged)


def as_one_head(keys: Keys, latent: Latent) -> Keys:
    """Return the keys of attention with the rows of the cache as its only head of keys.

    With YaRN, the rotated values stay as large as they are. Both sides of q.k are larger by 1 + m ln(factor) instead,
    where m is the file's yarn_log_multiplier: a tenth of that of other architectures.
    """
    m = 0.0
    if keys.get("rope.scaling.type") == "yarn":
        m = keys.number("rope.scaling.yarn_log_multiplier", 0.0)
    larger = yarn_attention(keys.number("rope.scaling.factor", 1.0), 10 * m)
    changed: dict[str, Any] = {
        **dict.fromkeys(("attention.key_length", "attention.value_length"), latent.n_row),
        "attention.head_count_kv": 1,
        "attention.scale": larger**2 * (latent.n_nope + latent.n_rot) ** -0.5,
        **({"rope.scaling.yarn_attn_factor": 1.0} if m else {}),
    }
    return Keys({**keys.metadata, **{f"{keys.prefix}.{key}": value for key, value in changed.items()}}, keys.prefix)
