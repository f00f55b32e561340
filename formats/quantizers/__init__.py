"""Floats become blocks, byte for byte as ggml writes them. Start with quantizer.py, then lanes.py (why it is fast)."""
