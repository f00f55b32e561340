"""Logits to a token. Start with params.py, then sampler.py."""
