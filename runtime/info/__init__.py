"""Facts about GGUF files: contents, differences, edits, what fits this machine. Start with contents.py."""
