"""Which type each tensor gets, then the new file. Start with rules.py."""
