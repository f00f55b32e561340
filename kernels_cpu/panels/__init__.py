"""A weight's form on the CPU: 16 rows interleaved. Start with panels.py (the layouts), then repack.py."""
