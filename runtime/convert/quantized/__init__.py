"""Checkpoints whose weights are quantized already: GPTQ, AWQ, FP8 and others. Start with methods.py."""
