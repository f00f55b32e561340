"""A checkpoint of Hugging Face as a GGUF file. Start with open_checkpoint.py."""
