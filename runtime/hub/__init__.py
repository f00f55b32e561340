"""A model's name to a file on this machine. Start with find.py."""
