"""Activation functions of gated feed-forward layers, in f32."""

import triton
import triton.language as tl


@triton.jit
def activate(x, NAME: tl.constexpr):
    """Return activation(x). NAME: "silu", or "gelu" in its tanh form, with tanh(y) = 2 sigmoid(2 y) - 1."""
    if NAME == "silu":
        return x * tl.sigmoid(x)
    else:
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def gate_by(gate, up, NAME: tl.constexpr):
    """Return activation(gate) * up. NAME: of `activate`, or "swiglu_oai" (models.ops.Moe)."""
    if NAME == "swiglu_oai":
        gate = tl.minimum(gate, 7.0)
        return gate * tl.sigmoid(1.702 * gate) * (tl.clamp(up, -7.0, 7.0) + 1.0)
    else:
        return activate(gate, NAME) * up
