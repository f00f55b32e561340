"""Rotary frequencies: a base, a scaling rule and factors give one frequency for each pair of dimensions."""

import numpy as np
from numpy.typing import ArrayLike

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
