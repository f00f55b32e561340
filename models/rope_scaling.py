"""How models stretch positions to longer contexts: the keys rope.scaling.*, and YaRN."""

import math

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models.keys import Keys, show
from gguf_run.models.operands import RopeScaling

SCALING_TYPES = ("none", "linear", "yarn", "longrope")  # longrope: the file has a factor for each frequency


def read_scaling(keys: Keys, n_ctx_train: int, yarn_truncate: bool) -> RopeScaling:
    """Read the keys rope.scaling.*. A factor without a type means linear scaling: old files have no type."""
    kind = keys.get("rope.scaling.type")
    if kind is not None and not (isinstance(kind, str) and kind in SCALING_TYPES):
        raise UnsupportedError(
            f"{keys.prefix}.rope.scaling.type is {show(kind)}; this program runs: {', '.join(SCALING_TYPES)}"
        )
    old_key = keys.get("rope.scaling.factor") is None and keys.get("rope.scale_linear") is not None
    factor = keys.number("rope.scale_linear" if old_key else "rope.scaling.factor", 1.0)
    return RopeScaling(
        type=kind or "linear",
        factor=factor or 1.0,  # 0 stands for no scaling
        n_ctx_orig=keys.integer("rope.scaling.original_context_length", n_ctx_train),
        attn_factor=keys.number("rope.scaling.attn_factor", 1.0),
        # llama.cpp's converter writes a checkpoint's own factor here, and its decoder does not read it.
        yarn_attn_factor=keys.number("rope.scaling.yarn_attn_factor", 0.0),
        ext_factor=keys.number("rope.scaling.yarn_ext_factor", 1.0, high=1),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0, low=0.001),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0, low=0.001),
        log_multiplier=keys.number("rope.scaling.yarn_log_multiplier", 0.0),
        truncate=keys.flag("rope.scaling.yarn_truncate", yarn_truncate),
    )


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


def yarn(
    inv_freq: NDArray[np.float64], n_rot: int, freq_base: float, scaling: RopeScaling
) -> tuple[NDArray[np.float64], float]:
    """Return the frequencies that YaRN makes of those of the first training, and the factor on the rotated values.

    Peng et al., 2023, arXiv:2309.00071, with its attention factor 1 + 0.1 ln(factor).
    """
    keep, scale = _ramp(n_rot, freq_base, scaling) * scaling.ext_factor, scaling.attn_factor
    if scaling.yarn_attn_factor:
        scale *= scaling.yarn_attn_factor
    elif scaling.ext_factor:
        scale *= yarn_attention(scaling.factor) / yarn_attention(scaling.factor, scaling.log_multiplier)
    return inv_freq * (keep + (1 - keep) / scaling.factor), scale


def _ramp(n_rot: int, freq_base: float, scaling: RopeScaling) -> NDArray[np.float64]:
    """Return f64[n_rot / 2]: 1 where a pair keeps its angle, 0 where the angle is divided by the factor."""
    low, high = yarn_range(n_rot, freq_base, scaling)
    return 1 - np.clip((np.arange(n_rot // 2) - low) / max(0.001, high - low), 0, 1)


def factors_of(tensor: Tensor) -> NDArray[np.float32]:
    """Return the divisors of the rotary frequencies, f32[n_rot / 2]."""
    if tensor.type.name != "F32":
        raise UnsupportedError(f"tensor {tensor.name} has the type {tensor.type.name}, must be F32")
    factors = tensor.blocks().reshape(-1).view(np.float32)
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise FormatError(f"tensor {tensor.name} has values that are not positive numbers")
    return factors
