"""A file and options to a ready model: placement, memory, devices. Start with parts.py."""
