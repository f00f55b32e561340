"""What a GGUF file holds. Start with reader.py; writer.py is the way back."""
