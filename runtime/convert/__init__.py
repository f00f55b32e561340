"""A Hugging Face checkpoint as a GGUF file, and back (back/). Start with open_checkpoint.py."""
