"""Rows times the KV cache. Start with attention.py (the op). cache_types.py is the table of cache types."""
