"""The tokenizer of a checkpoint as metadata.

Start with metadata.py. It has a reader for each kind of file, which makes a Vocabulary.
"""
