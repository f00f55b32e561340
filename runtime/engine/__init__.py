"""Prompt to text: everything that generates goes through here. Start with generation.py, then reply.py."""
