"""For programs that are written for llama-cpp-python: `from gguf_run.compat import Llama`. See runtime/compat.py."""

from gguf_run.runtime.compat import Llama as Llama
