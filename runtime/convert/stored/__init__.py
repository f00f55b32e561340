"""The files of a checkpoint, and tensors that are computed when they are read. Start with checkpoint.py."""
