"""Checkpoints whose weights are quantized already: GPTQ, AWQ, FP8 and others.

Start with methods.py. Weights on a grid of integers go through grid.py.
"""
