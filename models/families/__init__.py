"""The table of architectures, by family. architectures.py looks a name up in one module after the other."""
