"""Text to tokens and back. Start with tokenizer.py."""
