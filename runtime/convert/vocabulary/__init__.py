"""The tokenizer of a checkpoint as metadata. Start with metadata.py; each kind of file has a reader."""
