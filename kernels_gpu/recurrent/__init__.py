"""Layers that keep a state instead of keys and values. state.py is what a layer keeps."""
