"""Rows times the KV cache. Start with launch.py; cache_types.py is the table of cache types."""
