"""Rotary frequencies: a base, a scaling rule and factors give one frequency for each pair of dimensions."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models.architectures import ROPE_FACTORS
from gguf_run.models.config import ModelConfig
from gguf_run.models.operands import UNSCALED, RopeScaling, Rotation


def make_rope(
    style: str,
    n_rot: int,
    freq_base: float,
    scaling: RopeScaling = UNSCALED,
    factors: ArrayLike | None = None,
    long_factors: ArrayLike | None = None,
) -> Rotation:
    """Return the rotation of llama.cpp, with frequencies computed in float64.

    factors: [n_rot / 2], the divisor of each frequency (`rope_freqs.weight`, Llama 3.1).
    long_factors: the divisors in sequences of more than scaling.n_ctx_orig tokens; None: the same (LongRoPE).
    """
    inv_freq = freq_base ** (-np.arange(0, n_rot, 2, dtype=np.float64) / n_rot)
    scale = scaling.attn_factor
    if scaling.type == "linear":
        inv_freq /= scaling.factor
    elif scaling.type == "yarn":
        from gguf_run.models.rope_scaling import yarn  # late: few models have it

        inv_freq, scale = yarn(inv_freq, n_rot, freq_base, scaling)
    short, long = (inv_freq if f is None else inv_freq / np.asarray(f, np.float64) for f in (factors, long_factors))
    return Rotation(style, n_rot, short, scale, None if long_factors is None else long, scaling.n_ctx_orig)


def rotations(config: ModelConfig, tensors: Mapping[str, Tensor], n_ctx: int) -> list[Rotation | None]:
    """Return the rotation of each layer, None for a layer that does not rotate. Layers with equal numbers share one."""
    arch, scaling = config.arch, config.rope_scaling
    freqs = long = short = None
    if any(name in tensors for name in ROPE_FACTORS):
        from gguf_run.models.rope_scaling import factors_of

        freqs, long, short = (factors_of(tensors[name]) if name in tensors else None for name in ROPE_FACTORS)
    factors = short if freqs is None else freqs
    long_factors = long if freqs is None and n_ctx > scaling.n_ctx_orig else None
    base, base_swa = config.rope_freq_base, config.rope_freq_base_swa
    has_two = base != base_swa or not arch.swa_rope_scaled
    made: dict[tuple[int, bool], Rotation] = {}
    for layer in config.layers:
        key = n_rot, is_swa = layer.n_rot, has_two and layer.window > 0
        if key in made or not n_rot:
            continue
        if is_swa:
            made[key] = make_rope(arch.rope_style, n_rot, base_swa, scaling if arch.swa_rope_scaled else UNSCALED)
        else:
            made[key] = make_rope(arch.rope_style, n_rot, base, scaling, factors, long_factors)
    return [made.get((layer.n_rot, has_two and layer.window > 0)) for layer in config.layers]
