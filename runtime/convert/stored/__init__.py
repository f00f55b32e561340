"""The files of a checkpoint, and tensors that are computed from them when read. Start with checkpoint.py."""
