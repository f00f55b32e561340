"""Models: architectures as a table, a step as a list of ops, and the decoder that runs steps.

Start with ops.py, which declares the ops, then step.py, which lists the ops of each layer.
"""
