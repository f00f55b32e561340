"""Types of tensors and their bits. Start with types.py (the table), then unpack.py (a block taken apart)."""
