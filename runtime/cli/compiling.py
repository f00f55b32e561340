"""What a user sees while a model's kernels are compiled, which takes from seconds to minutes, once."""

import threading
from contextlib import suppress
from pathlib import Path
from typing import Self

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.hub.find import find_model
from gguf_run.runtime.load.compile_ahead import missing_kernels
from gguf_run.runtime.load.options import LoadOptions
from gguf_run.runtime.terminal.progress import Progress

_SECONDS_PER_LOOK = 0.2


class Compiling:
    """Says which model the kernels are for, then counts the kernels that are in the cache. A context manager."""

    def __init__(self, name: str | None, options: LoadOptions, bar: Progress) -> None:
        """name, options: of the model that is loaded. bar: of the loading, whose line is taken."""
        self._bar = bar
        self._over = threading.Event()
        path, self._files = find_model(name, "any"), list[Path]()
        with suppress(GgufRunError, OSError):  # loading tells what is wrong
            self._files = missing_kernels(path, options)
        n_missing = f" ({len(self._files)} are missing)" if self._files else ""
        bar.message(f"compiling kernels for {path.name}{n_missing}; this takes some seconds, once")
        self._thread = threading.Thread(target=self._count, daemon=True)

    @property
    def is_over(self) -> bool:
        """Whether the line is free again."""
        return not self._thread.is_alive()

    def _count(self) -> None:
        n_done, n_shown = 0, -1
        while n_done < len(self._files) and not self._over.wait(_SECONDS_PER_LOOK):
            n_done = sum(file.is_file() for file in self._files)
            if n_done != n_shown:
                self._bar.show(f"compiled {n_done} of {len(self._files)} kernels")
            n_shown = n_done
        self._bar.clear()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
