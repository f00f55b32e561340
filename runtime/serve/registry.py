"""The models that a server offers: loaded when they are first asked for, never closed under an answer."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_run.runtime.chat.calls.family import Family, family_of
from gguf_run.runtime.chat.process import TemplateProcess
from gguf_run.runtime.model import Model
from gguf_run.runtime.serve.errors import RETRY_AFTER, HttpError

if TYPE_CHECKING:
    from gguf_run.runtime.engine.constraint import Constraint

Load = Callable[[str, Callable[[int, int], None]], Model]


class Served:
    """A model that is loaded, and what the server knows of it."""

    def __init__(self, name: str, model: Model) -> None:
        self.name, self.model, self.created = name, model, int(time.time())
        self.family: Family = family_of(model.tool_template or model.chat_template)
        self.adapters: Mapping[str, float] | None = None  # scales of the requests by this name; None: as loaded
        self.base = self
        self.keep_alive: float | None = None  # seconds until it is unloaded; None: as the registry says
        self.n_users = 0  # requests that are under way
        self.used_at = time.monotonic()  # when the last one ended

    def constraint(self, kind: str, text: str) -> "Constraint":
        """Return what an answer may be. OptionError for a grammar that is refused. It may take a second."""
        from gguf_run.runtime.engine.grammar import Grammar, Grammars

        model = self.model
        model.grammars = model.grammars or Grammars(model.tokenizer, model.decoder.config.n_vocab)
        return model.grammars.constraint(Grammar.of(text) if kind == "grammar" else Grammar(kind, text))

    def token_id(self, text: str) -> int | None:
        """Return the id of a control token by its text, None if there is none."""
        tokenizer = self.model.tokenizer
        ids = tokenizer.encode(text, add_special=False)
        return ids[0] if len(ids) == 1 and not tokenizer.piece(ids[0], skip_special=True) else None


class Registry:
    """Models by name."""

    def __init__(self, paths: Mapping[str, str | Path], load: Load) -> None:
        """paths: of the models, by the names that clients use; the first one answers where none is named.

        load: makes a model from a path, and tells its progress in bytes.
        """
        self.paths, self._load = dict(paths), load
        self.loaded: dict[str, Served] = {}
        self.progress: dict[str, tuple[int, int]] = {}  # of models that are being loaded: bytes, of bytes
        self._lock = asyncio.Lock()  # one model is loaded at a time

    @property
    def names(self) -> Sequence[str]:
        """All models that can be asked for."""
        return list(self.paths)

    def find(self, name: str | None) -> str:
        """Return the name of the model that a client means. HttpError 404 if there is none of this name.

        A server of one model answers to every name: many clients have one of their own.
        """
        if name in self.paths:
            return str(name)
        if len(self.paths) == 1 or not name:
            return next(iter(self.paths))
        raise HttpError(404, f"model {name!r:.80} is not here: {', '.join(self.paths)} are", "model_not_found")

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Served]:
        """Load a model if it is not loaded, and keep it within the block."""
        served = await self.get(self.find(name))
        served.n_users += 1
        try:
            yield served
        finally:
            served.n_users -= 1
            served.used_at = time.monotonic()

    async def get(self, name: str) -> Served:
        """Return a model, which is loaded now."""
        if name not in self.loaded:
            async with self._lock:
                if name not in self.loaded:
                    self.loaded[name] = await asyncio.to_thread(self._make, name)
        return self.loaded[name]

    def _make(self, name: str) -> Served:
        try:
            model = self._load(str(self.paths[name]), lambda n, total: self.progress.update({name: (n, total)}))
        finally:
            self.progress.pop(name, None)
        model.engine.start()
        if model.chat_template is not None:
            model.templates = TemplateProcess().start()
        return Served(name, model)

    def check_ready(self) -> None:
        """HttpError 503 while the first model is being loaded and none is ready."""
        if not self.loaded and self.progress:
            n, total = next(iter(self.progress.values()))
            percent = f"{100 * n // max(total, 1)} %"
            raise HttpError(503, f"Loading model: {percent}", "unavailable_error", RETRY_AFTER, progress=percent)

    def close(self) -> None:
        """Close all models."""
        for served in self.loaded.values():
            served.model.close()
        self.loaded.clear()

    def info(self) -> list[dict[str, Any]]:
        """Return the entries of /v1/models."""
        return [
            {
                "id": name,
                "object": "model",
                "created": self.loaded[name].created if name in self.loaded else 0,
                "owned_by": "gguf-run",
                "max_model_len": self.loaded[name].model.n_ctx if name in self.loaded else None,
            }
            for name in self.paths
        ]
