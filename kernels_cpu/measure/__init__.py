"""What is measured with kernels of its own: the limits of the machine (limits.py), what suits it (tune.py), and logits
(log_softmax.py)."""
