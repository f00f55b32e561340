"""Ops that work on rows of activations: norms, rotation, embedding, activation functions."""
