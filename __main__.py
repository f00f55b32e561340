"""`python -m gguf_run` is gguf-run."""

from gguf_run.runtime.cli.start import run

run()
