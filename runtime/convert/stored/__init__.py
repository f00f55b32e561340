"""The files of a checkpoint. Start with checkpoint.py."""
