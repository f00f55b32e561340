"""The one place that knows numba: functions are compiled at their first call and kept on disk. Start with jit.py."""
