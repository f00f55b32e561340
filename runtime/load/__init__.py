"""A file and options become a ready model: placement on devices, memory, KV cache types. Start with load_model.py.

options.py is what a user can choose. fit.py and devices.py are imported only where a GPU is tried.
"""
