"""What a GGUF file says of itself. It prints nothing."""
