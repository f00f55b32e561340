"""The commands, one file each. Nothing imports this folder. Start with run.py, which is gguf-run."""
