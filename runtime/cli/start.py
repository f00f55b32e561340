"""Where each tool begins: Ctrl-C ends it from the first moment on, also while its modules are imported.

This file is small, and so is all that it imports: what comes before it, the start of Python, is not ours to change.
"""

import os
from _collections_abc import Callable  # of collections.abc, which Python has loaded already

# The module signal takes 10 ms to import; this is what it is made of.
from _signal import (  # type: ignore[import-not-found]
    SIG_IGN,
    SIGINT,
    default_int_handler,
    getsignal,
    signal,
)


def _tool(name: str, module: str) -> Callable[[], None]:
    """Return what runs a command, from a module of this folder. Where Ctrl-C is ignored, it stays ignored."""

    def run() -> None:
        is_ignored = getsignal(SIGINT) == SIG_IGN
        if not is_ignored:
            signal(SIGINT, _leave)
        from importlib import import_module

        command = import_module(module, __package__).main
        if is_ignored:
            command(prog_name=name)
        try:
            signal(SIGINT, default_int_handler)
            command(prog_name=name)  # ends with SystemExit
        except KeyboardInterrupt:
            _leave()
        finally:
            signal(SIGINT, _leave)

    return run


def _leave(*_: object) -> None:
    """End the process at once: nothing was begun yet, or all is done."""
    os._exit(130)  # INTERRUPTED of common.py, which takes long to import


run = _tool("gguf-run", ".run")
info = _tool("gguf-info", ".info")
tokenize = _tool("gguf-tokenize", ".tokenize")
evaluate = _tool("gguf-eval", ".evaluate")
bench = _tool("gguf-bench", ".bench")
quantize = _tool("gguf-quantize", ".quantize")
convert = _tool("gguf-convert", ".convert")
imatrix = _tool("gguf-imatrix", ".imatrix")
serve = _tool("gguf-serve", ".serve")
train = _tool("gguf-train", ".train")
