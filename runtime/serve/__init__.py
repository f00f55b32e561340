"""The server, gguf-serve: HTTP over the engine. Start with app.py."""
