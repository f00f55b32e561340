"""The GPU backend, in Triton. Start with backend.py, then fuse.py and launch.py: from ops to launches.

Nothing of it is imported unless a GPU is used, except files without torch: sizes.py, fuse.py and tables of types.
"""
