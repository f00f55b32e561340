"""gguf-run --session: a conversation and its KV cache are read from a file and saved to it at the end."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.terminal.text import message

if TYPE_CHECKING:
    from gguf_run.runtime.model import Model

Conversation = list[dict[str, Any]]


def check_place(path: Path, option: str = "--session") -> None:
    """GgufRunError if a session cannot be saved at `path`: the user learns it before a long chat, not after it."""
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise GgufRunError(f"{option} {path}: cannot be written: name a file in a folder that can be")


@contextmanager
def conversation(model: "Model", path: Path, system: str | None) -> Iterator[Conversation]:
    """Yield the conversation so far, for the block to add to; save it when the block ends without an error.

    path: the session's file.
    system: a system message, which replaces that of the file.
    """
    messages: Conversation = []
    if path.exists():
        start = time.perf_counter()
        messages = model.load_session(path)
        seconds = time.perf_counter() - start
        message(f"{path}: {model.decoder.n_past} tokens, {len(messages)} messages restored in {1000 * seconds:.0f} ms")
    if system is not None:
        if messages and messages[0]["role"] == "system":
            del messages[0]
        messages.insert(0, {"role": "system", "content": system})
    yield messages
    model.save_session(path, messages)
