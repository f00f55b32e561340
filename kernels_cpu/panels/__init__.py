"""The form that weights have on the CPU: groups of 16 rows, interleaved. Start with panels.py."""
