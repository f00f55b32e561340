"""Floats to blocks, byte for byte as ggml writes them. Start with quantizer.py."""
