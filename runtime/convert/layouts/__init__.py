"""The table of checkpoints: a row for each architecture of Hugging Face checkpoints, by family."""
