"""Rows times the KV cache. Start with attention.py; cache_types.py is the table of cache types."""
