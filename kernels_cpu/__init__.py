"""The CPU backend. Start with backend.py, then lower.py, which turns the ops of a step into kernels on a tape."""
