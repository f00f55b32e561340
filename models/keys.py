"""Typed look-ups in a model's metadata, checked before anything relies on a number."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.frozen import frozen
from gguf_run.models.operands import Temperature
from gguf_run.models.rope import SCALING_TYPES, RopeScaling

MAX_LAYERS = 1024
_MAX_SIZE = 2**31 - 1


def show(value: Any) -> str:
    """Return a value as one short line."""
    if value is None:
        return "missing"
    if isinstance(value, str | int | float):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    return f"an array of {len(value)} values"


@frozen
class Keys:
    """The metadata of one architecture. Errors name the key, the value found and the values allowed."""

    metadata: Mapping[str, Any]
    prefix: str

    def get(self, key: str) -> Any:
        return self.metadata.get(f"{self.prefix}.{key}")

    def wrong(self, key: str, allowed: str) -> FormatError:
        return FormatError(f"{self.prefix}.{key} is {show(self.get(key))}, must be {allowed}")

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = _MAX_SIZE) -> int:
        """Return an integer. The file may have an array with one integer for each layer, if all are equal."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, np.ndarray) and value.ndim == 1 and value.size:
            if (value != value[0]).any():
                raise UnsupportedError(
                    f"{self.prefix}.{key} differs from layer to layer ({value.min()} to {value.max()}); "
                    "this program runs models with equal layers"
                )
            value = value[0].item()
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(key, f"an integer from {low} to {high}")
        return value

    def integers(self, key: str, n: int, default: Sequence[int] | None = None, low: int = 1) -> Sequence[int]:
        """Return one integer for each of n layers. A file that has one integer means it for all layers."""
        value = self.get(key)
        if not isinstance(value, np.ndarray):
            return default if value is None and default is not None else (self.integer(key, low=low),) * n
        if value.shape != (n,) or value.dtype.kind not in "iu" or value.min() < low or value.max() > _MAX_SIZE:
            raise self.wrong(key, f"{n} integers of at least {low}, one for a layer")
        return tuple(value.tolist())

    def number(self, key: str, default: float | None = None, low: float = 0.0, high: float = 1e6) -> float:
        """Return a number from low to high."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.wrong(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return default if value is None else value

    def factor(self, key: str) -> float:
        """Return a number to multiply or divide by; 1 if it is missing or 0."""
        value = self.number(key, 1.0) or 1.0
        if value < 1e-6:
            raise self.wrong(key, "a number from 1e-06 to 1e+06")
        return value


def rope_scaling(keys: Keys, n_ctx_train: int, yarn_truncate: bool) -> RopeScaling:
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


def temperature(keys: Keys, built_in: tuple[float, int, int] | tuple[()]) -> Temperature | None:
    """Return the temperature of the queries. built_in: scale, length and offset, unless the file has others."""
    scale, length, offset = built_in or (0.0, 0, 0)
    if not (scale := keys.number("attention.temperature_scale", scale)):
        return None
    length = keys.integer("attention.temperature_length", length, low=0)
    return Temperature(scale, length or keys.integer("rope.scaling.original_context_length"), offset)


def swa_layers(keys: Keys, n_layer: int, period: int) -> tuple[bool, ...]:
    """Return which layers have the window: as the file lists, or all but every period-th layer (0: all layers)."""
    pattern = keys.get("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        if pattern.shape != (n_layer,) or pattern.dtype.kind not in "biu":
            raise keys.wrong("attention.sliding_window_pattern", f"{n_layer} values of true or false, one for a layer")
        return tuple(bool(v) for v in pattern)
    default = period if period >= 0 else None
    period = keys.integer("attention.sliding_window_pattern", default, low=0, high=MAX_LAYERS)
    return tuple(period == 0 or (il + 1) % period != 0 for il in range(n_layer))
