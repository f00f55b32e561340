"""The server, gguf-serve: HTTP over the engine. Start with app.py. Each API writes its answers by a Writer: http.py."""
