"""Tensor types and the bits of their blocks. Start with types.py (the table), then unpack.py (how blocks are read)."""
