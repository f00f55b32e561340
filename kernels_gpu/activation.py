"""Activation functions of gated feed-forward layers, in f32."""

import triton
import triton.language as tl


@triton.jit
def activate(x, NAME: tl.constexpr):  # type: ignore[no-untyped-def]
    """NAME: "silu", or "gelu" in its tanh form, tanh(y) = 2 sigmoid(2 y) - 1."""
    if NAME == "silu":
        return x * tl.sigmoid(x)
    else:
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
