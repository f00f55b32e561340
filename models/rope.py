"""Rotary frequencies: from a base, a scaling rule and per-frequency factors to one number per pair of dimensions."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gguf_run.models.backend import Rope


@dataclass(frozen=True)
class RopeScaling:
    """How positions are stretched to a context longer than the one of the first training.

    type: "none", "linear" (every angle divided by factor), "yarn" (only slow angles are) or "longrope" (the file has a
    factor for each). n_ctx_orig: context of the first training. attn_factor: extra factor on the rotated values,
    whatever the type. yarn only: ext_factor weighs the unscaled fast angles; pairs that turn more than beta_fast times
    in n_ctx_orig positions stay as they are, those that turn less than beta_slow times are divided by factor, and a
    linear ramp joins them, whose ends are whole pairs if truncate. log_multiplier: 0, or what the attention factor is
    divided by is computed with.
    """

    type: str = "none"
    factor: float = 1.0
    n_ctx_orig: int = 0
    attn_factor: float = 1.0
    ext_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    log_multiplier: float = 0.0
    truncate: bool = True


UNSCALED = RopeScaling()
SCALING_TYPES = ("none", "linear", "yarn", "longrope")


def _yarn_ramp(n_rot: int, freq_base: float, scaling: RopeScaling) -> NDArray[np.float64]:
    """Return f64[n_rot/2]: 1 where a pair keeps its angle, 0 where the angle is divided by the factor."""

    def pair_of(n_turns: float) -> float:
        # Pair i turns n_ctx_orig / (2 pi) * freq_base ** (-2i / n_rot) times in n_ctx_orig positions; solved for i.
        return n_rot * math.log(scaling.n_ctx_orig / (n_turns * 2 * math.pi)) / (2 * math.log(freq_base))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(0, low), min(n_rot - 1, high)
    return 1 - np.clip((np.arange(n_rot // 2) - low) / max(0.001, high - low), 0, 1)


def make_rope(
    style: str, n_rot: int, freq_base: float, scaling: RopeScaling = UNSCALED, factors: ArrayLike | None = None
) -> Rope:
    """Compute the frequencies in float64, with the results that llama.cpp reaches in its kernel and its context set-up.

    factors: [n_rot/2], each divides its frequency (`rope_freqs.weight`, Llama 3.1). YaRN: Peng et al., 2023,
    arXiv:2309.00071, with the attention factor 1 + 0.1 ln(factor) that it proposes.
    """
    inv_freq = freq_base ** (-np.arange(0, n_rot, 2, dtype=np.float64) / n_rot)
    if factors is not None:
        inv_freq /= np.asarray(factors, np.float64)
    scale = scaling.attn_factor
    if scaling.type == "linear":
        inv_freq /= scaling.factor
    elif scaling.type == "yarn":
        keep = _yarn_ramp(n_rot, freq_base, scaling) * scaling.ext_factor
        inv_freq *= keep + (1 - keep) / scaling.factor
        if scaling.ext_factor and scaling.factor > 1:
            scale *= 1 + 0.1 * math.log(scaling.factor)
            scale /= 1 + 0.1 * scaling.log_multiplier * math.log(scaling.factor)
    return Rope(style, n_rot, inv_freq, scale)
