"""Where each tool begins: Ctrl-C ends it from the first moment on, also while its modules are imported.

This file is small, and so is all that it imports: what comes before it, the start of Python, is not ours to change.
"""

import importlib
import os
import signal


def _run(module: str) -> None:
    """Run the command of a module in this folder. Where Ctrl-C is ignored, it stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        importlib.import_module(module, __package__).main()
        return
    signal.signal(signal.SIGINT, _leave)
    command = importlib.import_module(module, __package__).main
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        command()  # ends with SystemExit
    except KeyboardInterrupt:
        _leave()
    finally:
        signal.signal(signal.SIGINT, _leave)


def _leave(*_: object) -> None:
    """End the process at once: nothing was begun yet, or all is done."""
    os._exit(130)  # INTERRUPTED of common.py, which takes long to import


def run() -> None:
    """gguf-run."""
    _run(".run")


def info() -> None:
    """gguf-info."""
    _run(".info")


def tokenize() -> None:
    """gguf-tokenize."""
    _run(".tokenize")


def evaluate() -> None:
    """gguf-eval."""
    _run(".evaluate")


def bench() -> None:
    """gguf-bench."""
    _run(".bench")


def quantize() -> None:
    """gguf-quantize."""
    _run(".quantize")


def convert() -> None:
    """gguf-convert."""
    _run(".convert")


def imatrix() -> None:
    """gguf-imatrix."""
    _run(".imatrix")
