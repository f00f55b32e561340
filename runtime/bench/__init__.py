"""Timing a model: gguf-bench without its command line. It prints nothing.

bench.py runs the tests, output.py makes text of the results.
"""
