"""How good a model is: perplexity, divergence from a base, multiple choice, importance matrices. It prints nothing.

Start with text.py, which cuts a text into chunks and scores their tokens. Each other file is one evaluation: a
generator that yields its result after every chunk or task.
"""
