"""Rows times panels. Start with launch.py; decode.py is the kernel for a few tokens."""
