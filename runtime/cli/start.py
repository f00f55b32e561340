"""Where each tool begins: Ctrl-C ends it from the first moment on, also while its modules are imported.

This file is small, and so is all that it imports: what comes before it, the start of Python, is not ours to change.
"""

import os

# The module signal takes 10 ms to import; this is what it is made of.
from _signal import (  # type: ignore[import-not-found]
    SIG_IGN,
    SIGINT,
    default_int_handler,
    getsignal,
    signal,
)


def _run(name: str, module: str) -> None:
    """Run the command of that name, from a module of this folder. Where Ctrl-C is ignored, it stays ignored."""
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


def _leave(*_: object) -> None:
    """End the process at once: nothing was begun yet, or all is done."""
    os._exit(130)  # INTERRUPTED of common.py, which takes long to import


def run() -> None:
    _run("gguf-run", ".run")


def info() -> None:
    _run("gguf-info", ".info")


def tokenize() -> None:
    _run("gguf-tokenize", ".tokenize")


def evaluate() -> None:
    _run("gguf-eval", ".evaluate")


def bench() -> None:
    _run("gguf-bench", ".bench")


def quantize() -> None:
    _run("gguf-quantize", ".quantize")


def convert() -> None:
    _run("gguf-convert", ".convert")


def imatrix() -> None:
    _run("gguf-imatrix", ".imatrix")
