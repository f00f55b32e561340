"""The way back: a GGUF file as a Hugging Face checkpoint. Start with checkpoint.py."""
