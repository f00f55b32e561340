"""Prompt to text: everything that generates goes through here. Start with engine.py, then sequence.py and rows.py."""
