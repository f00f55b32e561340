"""Launches of attention: rope and append, parts of the positions, the sum of the parts."""

from dataclasses import dataclass
from typing import Any

import triton

from gguf_run.kernels_gpu.attention.append import append
from gguf_run.kernels_gpu.attention.attention import add_up, attend
from gguf_run.kernels_gpu.attention.cache import GpuCache
from gguf_run.kernels_gpu.attention.cache_types import SPAN
from gguf_run.kernels_gpu.buffers import Launch, Memory
from gguf_run.kernels_gpu.device.device import registers
from gguf_run.kernels_gpu.device.tuning import GRAPHS
from gguf_run.kernels_gpu.fuse import FusedAttention
from gguf_run.kernels_gpu.tables import Cut
from gguf_run.models.operands import AttentionShape

_PARTS = 16  # that add_up reads at a time


@dataclass(frozen=True)
class _Tiling:
    """How attention of one layer is cut into programs."""

    cache: GpuCache
    shape: AttentionShape
    programs: int  # that keep the GPU busy

    def cut(self, options: dict[str, Any]) -> Cut:
        """Return how the work is cut into items for such tiles."""
        n_tile = self.shape.n_head_kv * -(-self.shape.n_head // self.shape.n_head_kv // options["REP"])
        n_blocks = -(-self.cache.n_seen // options["SPAN"])
        return Cut(options["TOKENS"], options["SPAN"], n_blocks, max(1, self.programs // n_tile))

    def options(self, *, wide: bool) -> dict[str, Any]:
        """Return the sizes of tiles, and the launch options.

        wide: for long runs, whose tokens share the reading of keys and values. Else for runs of up to SHORT tokens.
        TOKENS, REP: tokens and heads of a tile of queries.
        SPAN: positions of a tile of keys.

        A tile must fit into registers; tests/helpers/gpu_compile.py checks that. Hopper's tensor cores need 64 queries.
        """
        types = self.cache.k.type, self.cache.v.type
        rep = triton.next_power_of_2(self.shape.n_head // self.shape.n_head_kv)
        # The keys of latent attention have 576 columns. Rows of 512 quantized ones need more registers than f16.
        has_wide_rows = self.cache.k.width > (256 if any(type.bits < 16 for type in types) else 512)
        rep = min(rep, 16) if has_wide_rows else rep
        floats = has_wide_rows or any(type.bits == 32 for type in types)
        narrow = self.cache.k.width <= 128 and not floats
        less = SPAN // 4 if floats else SPAN // 2
        if not wide:  # 16 queries are the fewest of tensor cores
            span, n_warp = (SPAN, 4) if narrow else (less, 8)
            return {"TOKENS": max(1, 16 // rep), "REP": rep, "SPAN": span, "num_warps": n_warp} | registers(255)
        n_row = 16 if floats else 64 if narrow and all(type.bits > 4 and type.name != "bf16" for type in types) else 32
        span = SPAN if narrow and all(type.name == "f16" for type in types) else less
        return {"TOKENS": max(1, n_row // rep), "REP": rep, "SPAN": span, "num_warps": 8} | registers(255)


def bind_attention(fused: FusedAttention, memory: Memory) -> Launch:
    """Return a function that launches attention for so many rows."""
    op, rotation, step, outputs = fused.op, fused.rotation, memory.step, fused.op.q.outputs
    tokens, (q, k, v, out) = step.of(outputs), (memory.strided(x) for x in (op.q, op.k or op.q, op.v or op.q, op.out))
    cache: GpuCache = op.cache
    shape, k_rows, v_rows = op.shape, op.cache.k, op.cache.v
    n_head, n_head_kv = shape.n_head, shape.n_head_kv
    tiling = _Tiling(cache, shape, memory.tuning.programs)
    ways = [tiling.options(wide=wide) for wide in (False, True)]
    cuts = [tiling.cut(way) for way in ways]
    items = [step.items(cut, wide=bool(wide), outputs=outputs) for wide, cut in enumerate(cuts)]
    n_sum = n_head * (memory.n_row(op.out) + max(cut.tokens * cut.n_part for cut in cuts))
    memory.want(sums=n_sum * shape.n_value, stats=n_sum * 2)
    int8 = memory.int8(op.out) if fused.forms else None
    n_changed = n_head if rotation or fused.norms or k_rows.rotates else 0  # heads of q that append writes
    norms = ([norm.weight for norm in fused.norms] + [None, None])[:2]
    eps = fused.norms[0].eps if fused.norms else 0.0
    angles = None if rotation is None else memory.angles(rotation, outputs)
    n_half, style = (rotation.n_rot // 2, rotation.style) if rotation else (0, None)
    types, sizes = (k_rows.type.name, v_rows.type.name), (shape.head_dim, k_rows.width)
    value = shape.n_value, max(32, triton.next_power_of_2(shape.n_value))
    n_new = n_changed + (len(cache.kinds) * n_head_kv if op.k else 0)  # heads of append: those of v come last
    pages = step.pages(cache.table)
    paged = pages, pages.stride(0), cache.table.n_pages

    def launch(n: int) -> None:
        sums = memory.scratch["sums"], memory.scratch["stats"]
        if n_new:
            append[(n, n_new)](
                *q, *k, *v, *norms, eps, k_rows.pair, v_rows.pair, k_rows.scales, v_rows.scales, tokens.seqs,
                tokens.positions, angles, n_half, *paged, n_changed, n_head_kv, style, *types, k_rows.rotates,
                v_rows.rotates, *sizes,
            )  # fmt: skip
        wide = step.is_wide[outputs]
        options, held = ways[wide], items[wide]
        n_item = held.most(n) if n <= GRAPHS[-1] else held.n
        attend[(n_item, -(-n_head // n_head_kv // options["REP"]) * n_head_kv)](
            *q, k_rows.pair, v_rows.pair, tokens.seqs, tokens.positions, step.runs, step.run_of, held.rows,
            *paged, *sums, n_head_kv, n_head // n_head_kv, shape.scale, shape.window or 1 << 30, shape.is_chunked,
            shape.is_causal, shape.softcap or None, *types, *sizes, *value, **options,
            num_stages=1 if k_rows.width > 512 else 2,
        )  # fmt: skip
        add_up[(n_item, n_head)](*sums, held.rows, op.sinks, *out, int8, _PARTS, v_rows.rotates, *value)

    return launch
