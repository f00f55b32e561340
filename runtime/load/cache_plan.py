"""Chooses the types of each layer's KV cache, from options and a calibration file; computes the caches' sizes."""

import os
from collections.abc import Sequence

from gguf_run.formats.errors import OptionError, did_you_mean
from gguf_run.kernels_cpu.attention.cache_types import CACHE_FORMATS, cache_bytes
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.kv_cache import N_STATES
from gguf_run.models.pages import PAGE, pages_stored
from gguf_run.runtime.load.options import DEFAULT_N_CTX

DEFAULT_TYPE = "f16"
_MOST_N_CTX = 32768  # of a server, unless it is told another


def plan_cache(
    config: ModelConfig,
    cache_type: str | tuple[str, str] | list[CacheType] | None = None,
    cache_rotation: bool | None = None,
    cache_scales: str | os.PathLike[str] | None = None,
) -> tuple[CacheType, ...]:
    """Return the cache type of each layer. The options are those of LoadOptions.

    A calibration file's static scales are used where rows are not rotated. OptionError for a type that is not known or
    that the model's heads do not allow; errors of read_scales.
    """
    if isinstance(cache_type, list):
        return tuple(cache_type)
    both = isinstance(cache_type, str)
    pair = (cache_type, cache_type) if isinstance(cache_type, str) else cache_type
    found = None
    if cache_scales is not None:
        from gguf_run.runtime.load.kv_scales import read_scales

        found = read_scales(cache_scales, config)
    plan = []
    for il in range(config.n_layer):
        layer = found[il] if found is not None else None
        k, v = pair or (layer and layer.types) or (DEFAULT_TYPE, DEFAULT_TYPE)
        check_type("--cache-type" if both else "--cache-type-k", k, config.attention(il).head_dim)
        if not config.attention(il).n_latent:
            check_type("--cache-type-v", v, config.attention(il).head_dim)
        static = (layer.scales(k, "k"), layer.scales(v, "v")) if layer and not cache_rotation else (None, None)
        plan.append(CacheType(k, v, cache_rotation, *static))
    return tuple(plan)


def check_type(option: str, name: str, head_dim: int) -> None:
    """OptionError unless heads of head_dim numbers can be stored as the type `name`."""
    if name not in CACHE_FORMATS:
        raise OptionError(
            f"{option} is {name!r}; {did_you_mean(name, CACHE_FORMATS)}allowed: {', '.join(CACHE_FORMATS)}"
        )
    if not CACHE_FORMATS[name].allows(head_dim):
        allowed = [other for other, form in CACHE_FORMATS.items() if form.allows(head_dim)]
        raise OptionError(
            f"{option} {name} stores blocks of {CACHE_FORMATS[name].block} numbers, the model's heads have {head_dim}; "
            f"allowed: {', '.join(allowed)}"
        )


def layer_bytes(
    config: ModelConfig,
    plan: Sequence[CacheType],
    n_ctx: int,
    n_batch: int,
    n_seq: int = 1,
    n_cells: int | None = None,
) -> tuple[int, ...]:
    """Return the bytes of each layer's cache and states. Layers with a window store only the window and a batch.

    A layer that reads another layer's cache has none. n_cells: see PageTable.new.
    """
    n_batch = max(min(n_batch, n_ctx), n_seq)
    sizes = []
    for il, kind in enumerate(plan):
        shape = config.attention(il)
        rows = PAGE * pages_stored(shape.window, n_ctx, n_batch, n_seq, n_cells)
        rows = rows if config.layers[il].kv_layer == il else 0
        rows_bytes = cache_bytes(kind.k, kind.v, shape.n_head_kv, shape.head_dim, rows, shape.n_latent)
        sizes.append(rows_bytes + state_bytes(config, il, n_seq))
    return tuple(sizes)


def state_bytes(config: ModelConfig, il: int, n_seq: int) -> int:
    """Return the bytes of the states of a recurrent layer, 0 for another layer."""
    return 4 * N_STATES * n_seq * sum(config.mixer.states(il)) if config.mixer is not None else 0


def cells_in(n_bytes: int, config: ModelConfig, plan: Sequence[CacheType], n_ctx: int, n_batch: int, n_seq: int) -> int:
    """Return the positions of all sequences together for which caches of n_bytes have room, states included.

    OptionError if there is no room for one sequence.
    """
    none, one = (sum(layer_bytes(config, plan, n_ctx, n_batch, n_seq, n_cells)) for n_cells in (0, PAGE))
    n_cells = n_seq * n_ctx if one == none else (n_bytes - none) // (one - none) * PAGE
    least = -(-n_ctx // PAGE) * PAGE
    if n_cells < least or n_bytes < none:
        lowest = (none + (one - none) * least // PAGE >> 20) + 1
        raise OptionError(
            f"cache_ram is {n_bytes >> 20} MiB; allowed: at least {lowest}, for one sequence of {n_ctx} "
            "tokens; or choose a smaller context (--ctx-size)"
        )
    return n_cells


def fit_cache(
    n_bytes: int, config: ModelConfig, plan: Sequence[CacheType], n_ctx: int | None, n_batch: int, n_seq: int
) -> tuple[int, int | None]:
    """Return positions of each sequence, and of all together (None: n_ctx for each), for caches of at most n_bytes.

    n_ctx: None chooses the model's own, at most 32768, halved down to 4096 while one sequence has no room. One sequence
    always gets its positions, whatever n_bytes says.
    """

    def size(n_ctx: int, n_cells: int | None) -> int:
        return sum(layer_bytes(config, plan, n_ctx, n_batch if config.arch.is_causal else n_ctx, n_seq, n_cells))

    chosen = n_ctx or min(config.n_ctx_train, _MOST_N_CTX)
    while n_ctx is None and chosen >= 2 * DEFAULT_N_CTX and size(chosen, chosen) > n_bytes:
        chosen //= 2
    if size(chosen, None) <= n_bytes:
        return chosen, None
    n_bytes = max(n_bytes, size(chosen, -(-chosen // PAGE) * PAGE))
    return chosen, cells_in(n_bytes, config, plan, chosen, n_batch if config.arch.is_causal else chosen, n_seq)
