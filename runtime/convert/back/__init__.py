"""The way back: a GGUF file as a checkpoint of Hugging Face.

Start with checkpoint.py.
"""
