"""Checkpoints whose weights are quantized already. Start with methods.py."""
