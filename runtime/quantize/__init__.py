"""Quantizing a file: which type each tensor gets (rules.py), then the new file (file.py). Start with plan.py."""
