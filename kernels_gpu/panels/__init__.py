"""The form that weights have on the GPU: planes of bits. Start with panels.py."""
