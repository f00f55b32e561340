"""Rotary frequencies: a base, a scaling rule and factors give one frequency for each pair of dimensions."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gguf_run.formats.frozen import frozen
from gguf_run.models.operands import Rotation


@frozen
class RopeScaling:
    """How a model stretches positions to a context longer than that of its first training."""

    type: str = "none"  # one of SCALING_TYPES
    factor: float = 1.0  # "linear" divides all angles by it, "yarn" only those of slow pairs, "longrope" none
    n_ctx_orig: int = 0  # context of the first training
    attn_factor: float = 1.0  # extra factor on the rotated values, for any type
    # "yarn" only:
    ext_factor: float = 1.0  # 1: fast pairs keep their angles; 0: their angles are divided too; between: a mix
    beta_fast: float = 32.0  # pairs that turn more often than this in n_ctx_orig positions are fast
    beta_slow: float = 1.0  # pairs that turn less often are slow; pairs between fast and slow are on a linear ramp
    yarn_attn_factor: float = 0.0  # the whole attention factor; 0: it follows from the factor
    log_multiplier: float = 0.0  # the attention factor is divided by 1 + 0.1 * log_multiplier * ln(factor)
    truncate: bool = True  # the ramp begins and ends at whole pairs


UNSCALED = RopeScaling()
SCALING_TYPES = ("none", "linear", "yarn", "longrope")  # longrope: the file has a factor for each frequency


def yarn_attention(factor: float, mscale: float = 1.0) -> float:
    """Return YaRN's attention factor."""
    return 1 + 0.1 * mscale * math.log(factor) if factor > 1 else 1.0


def yarn_range(n_rot: int, freq_base: float, scaling: RopeScaling) -> tuple[float, float]:
    """Return the pairs at which YaRN's ramp begins and ends."""

    def pair_of(n_turns: float) -> float:
        # Pair i turns n_ctx_orig / (2 pi) * freq_base ** (-2i / n_rot) times in n_ctx_orig positions; solved for i.
        return n_rot * math.log(scaling.n_ctx_orig / (n_turns * 2 * math.pi)) / (2 * math.log(freq_base))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(0, low), min(n_rot - 1, high)


def _yarn_ramp(n_rot: int, freq_base: float, scaling: RopeScaling) -> NDArray[np.float64]:
    """Return f64[n_rot / 2]: 1 where a pair keeps its angle, 0 where the angle is divided by the factor."""
    low, high = yarn_range(n_rot, freq_base, scaling)
    return 1 - np.clip((np.arange(n_rot // 2) - low) / max(0.001, high - low), 0, 1)


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

    YaRN: Peng et al., 2023, arXiv:2309.00071, with its attention factor 1 + 0.1 ln(factor).
    """
    inv_freq = freq_base ** (-np.arange(0, n_rot, 2, dtype=np.float64) / n_rot)
    scale = scaling.attn_factor
    if scaling.type == "linear":
        inv_freq /= scaling.factor
    elif scaling.type == "yarn":
        keep = _yarn_ramp(n_rot, freq_base, scaling) * scaling.ext_factor
        inv_freq *= keep + (1 - keep) / scaling.factor
        if scaling.yarn_attn_factor:
            scale *= scaling.yarn_attn_factor
        elif scaling.ext_factor:
            scale *= yarn_attention(scaling.factor) / yarn_attention(scaling.factor, scaling.log_multiplier)
    short, long = (inv_freq if f is None else inv_freq / np.asarray(f, np.float64) for f in (factors, long_factors))
    return Rotation(style, n_rot, short, scale, None if long_factors is None else long, scaling.n_ctx_orig)
