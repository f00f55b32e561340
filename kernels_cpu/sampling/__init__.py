"""Logits to a token, for all rows of a step at once. Start with choose.py; runtime/sampling/many.py calls it."""
