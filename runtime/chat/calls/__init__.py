"""Calls of tools in the text of an answer, in the form of each family of chat templates. Start with family.py."""
