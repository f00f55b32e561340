"""The k and v rows of tokens go into the cache: rotated if the cache type wants that, quantized, laid out."""

import functools

from gguf_run.formats.compiler.deferred import COMPILING
from gguf_run.formats.compiler.jit import carray
from gguf_run.kernels_cpu.attention.cache_rows import store_row
from gguf_run.kernels_cpu.replay.op import PER_THREAD, TapeOp, op
from gguf_run.kernels_cpu.replay.runs import runs_at
from gguf_run.models.kv_cache import GROUP
from gguf_run.models.pages import PAGE

if COMPILING:
    from gguf_run.kernels_cpu.attention.plan import first_of_group
    from gguf_run.kernels_cpu.vector.native import f32_at, i32_at, i64_at


@functools.cache
def append(k_form: int, v_form: int) -> TapeOp:
    """Return the op that stores the k and v rows of tokens in a cache of these types (places in FORMATS).

    v_form: -1 if v is not stored.
    """
    has_v = v_form >= 0
    store_k, store_v = store_row(k_form, 0), store_row(max(0, v_form), 1)

    @op(
        "rows runs run_of positions n_head_kv head_dim n_wide pages pages_stride n_pages "
        "cache_k k_wide k_group k_rotate k_static k k_stride "
        "cache_v v_wide v_group v_rotate v_static v v_stride scratch scratch_stride"
    )
    def append_rows(args, piece, ith, nth):
        a = carray(args, 1)[0]
        n_tokens, n, n_head = i64_at(a.rows, 1)[0], a.head_dim, a.n_head_kv
        n_parts = max(1, min(n_tokens // GROUP, PER_THREAD * nth))
        if piece < 0:
            return n_head * n_parts
        positions, run_of, runs = i64_at(a.positions, n_tokens), i64_at(a.run_of, n_tokens), runs_at(a.runs, n_tokens)
        pages = i32_at(a.pages, (runs[run_of[n_tokens - 1]].seq + 1) * a.pages_stride)
        k_static, v_static = f32_at(a.k_static, n_head), f32_at(a.v_static, n_head)
        head, part, scratch = piece % n_head, piece // n_head, a.scratch + ith * a.scratch_stride
        first = first_of_group(n_tokens * part // n_parts, n_tokens, positions, run_of)
        end = first_of_group(n_tokens * (part + 1) // n_parts, n_tokens, positions, run_of)
        for t in range(first, end):
            place, seq = positions[t], runs[run_of[t]].seq
            page = head * a.n_pages + pages[seq * a.pages_stride + place // PAGE]
            group, row = (page * PAGE + place % PAGE) // GROUP, place % GROUP
            k, to_k = a.k + t * a.k_stride + head * n * 4, a.cache_k + group * a.k_group
            store_k(k, n, a.n_wide, a.k_wide, a.k_rotate, k_static[head], to_k, row, scratch)
            if has_v:
                v, to_v = a.v + t * a.v_stride + head * n * 4, a.cache_v + group * a.v_group
                store_v(v, n, a.n_wide, a.v_wide, a.v_rotate, v_static[head], to_v, row, scratch)
        return 0

    return append_rows
