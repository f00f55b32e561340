"""Timing a model: gguf-bench without its command line. It prints nothing."""
