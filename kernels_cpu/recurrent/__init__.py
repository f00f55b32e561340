"""Layers that keep a state instead of keys and values. Start with delta_rule.py; state.py is what a layer keeps."""
