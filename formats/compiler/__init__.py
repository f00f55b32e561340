"""The one place that knows numba: functions are compiled on first use and kept on disk. Start with jit.py."""
