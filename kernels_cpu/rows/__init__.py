"""Ops on rows of activations: norms, rotation, embedding, activation functions. Start with norms.py: all look alike."""
