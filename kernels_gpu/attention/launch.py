"""How attention is launched: rope and append, parts of the positions, their sum."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor as Array

from gguf_run.kernels_gpu.attention.append import append
from gguf_run.kernels_gpu.attention.attention import add_up, attend
from gguf_run.kernels_gpu.attention.cache import GpuCache
from gguf_run.kernels_gpu.attention.cache_types import SPAN
from gguf_run.kernels_gpu.device.device import registers
from gguf_run.kernels_gpu.matmul.launch import FEW
from gguf_run.kernels_gpu.panels.memory import GpuBuffer
from gguf_run.kernels_gpu.rows.activations import Int8, power_of_2

_MOST_PARTS = 64


@dataclass(frozen=True)
class AttentionOp:
    """One layer's. shape, rope: of models.backend; rope, with its table angles: where q and k are yet to be turned.
    norms: of the heads of q and of k, before that: their weights and the eps, or None. programs: how many keep the GPU
    busy."""

    q: GpuBuffer
    k: GpuBuffer
    v: GpuBuffer
    cache: GpuCache
    shape: Any
    out: GpuBuffer
    sinks: Array | None
    rope: Any
    angles: Array | None
    norms: tuple[Array, Array, float] | None
    programs: int

    def _n_part(self, n: int) -> int:
        """Parts of the positions for n tokens, a power of two: so that a few tokens keep a whole GPU busy."""
        if n > FEW:
            return 1
        most = min(_MOST_PARTS, -(-self.cache.n_ctx // SPAN), self.programs // (n * self.shape.n_head_kv))
        return 1 << (max(1, most).bit_length() - 1)

    @property
    def n_sums(self) -> int:
        """Rows of memory that parts need."""
        return max(n * self._n_part(n) for n in (1, 2, 4, FEW, len(self.out.memory))) * self.shape.n_head

    def _tile(self, n: int) -> dict[str, Any]:
        """Tokens and heads of a tile of queries, positions of one of keys or values, and how it is launched: what fits
        into registers (tests/helpers/gpu_compile.py). 64 queries are what Hopper's tensor cores want."""
        forms = self.cache.k.form, self.cache.v.form
        rep = power_of_2(self.shape.n_head // self.shape.n_head_kv)
        floats = any(form.bits == 32 for form in forms)
        narrow = self.cache.k.width <= 128 and not floats
        less = SPAN // 4 if floats else SPAN // 2
        if n <= FEW:
            span = SPAN if narrow else less
            return {"TOKENS": 1, "REP": max(16, rep), "SPAN": span, "num_warps": 4 if narrow else 8} | registers(255)
        n_row = 16 if floats else 64 if narrow and all(form.bits > 4 and form.name != "bf16" for form in forms) else 32
        span = SPAN if narrow and all(form.name == "f16" for form in forms) else less
        return {"TOKENS": max(1, n_row // rep), "REP": rep, "SPAN": span, "num_warps": 8} | registers(255)

    def launch(self, n: int, step: Any, sums: list[Array], q8: Int8 | None) -> None:
        """step: program.StepInput. sums: memory for the parts' sums and what they are relative to. q8: gets the result
        too."""
        q, k, v, out, shape, rope = self.q, self.k, self.v, self.out, self.shape, self.rope
        k_rows, v_rows, n_ctx = self.cache.k, self.cache.v, self.cache.n_ctx
        n_head, n_head_kv = shape.n_head, shape.n_head_kv
        n_changed = n_head if rope or self.norms or k_rows.rotates else 0
        norms = self.norms or (None, None, 0.0)
        types, sizes = (k_rows.form.name, v_rows.form.name), (shape.head_dim, k_rows.width)
        append[(n, n_changed + 2 * n_head_kv)](
            q.data, q.stride, k.data, k.stride, v.data, v.stride, *norms, k_rows.qs, k_rows.d, v_rows.qs, v_rows.d,
            k_rows.scales, v_rows.scales, step.seqs, step.positions, self.angles, rope.n_rot // 2 if rope else 0,
            n_ctx, n_changed, n_head_kv, rope.style if rope else None, *types, k_rows.rotates, v_rows.rotates, *sizes,
        )  # fmt: skip
        tile, n_part = self._tile(n), self._n_part(n)
        attend[(-(-n // tile["TOKENS"]), n_head_kv, n_part)](
            q.data, q.stride, k_rows.qs, k_rows.d, v_rows.qs, v_rows.d, step.seqs, step.positions, *sums, n_ctx,
            n_head_kv, n_head // n_head_kv, n, shape.scale, shape.window or 1 << 30, shape.softcap or None, *types,
            *sizes, **tile, num_stages=2,
        )  # fmt: skip
        int8 = (q8.xq, q8.xd, q8.xs) if q8 else (None, None, None)
        add_up[(n, n_head)](
            *sums, self.sinks, out.data, out.stride, *int8, n_part, v_rows.rotates, *sizes,
        )  # fmt: skip
