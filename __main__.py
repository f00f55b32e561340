"""`python -m gguf_run` is gguf-run."""

from gguf_run.runtime.cli.run import main

main(prog_name="gguf-run")
