"""The activations of feed-forward networks. activation.py has their formulas."""

# Kernels are compiled for an activation given as a literal integer: its place in this tuple.
ACTIVATIONS = ("silu", "gelu", "swiglu_oai")
