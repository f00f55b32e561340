"""Reading and writing GGUF files. Start with reader.py; writer.py is the way back."""
