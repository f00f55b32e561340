"""The models that a server offers: loaded when they are first asked for, never closed under an answer."""

import asyncio
import copy
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.chat.calls.family import Family, family_of
from gguf_run.runtime.chat.process import TemplateProcess
from gguf_run.runtime.model import Model
from gguf_run.runtime.serve.counts import Counts
from gguf_run.runtime.serve.errors import RETRY_AFTER, HttpError

if TYPE_CHECKING:
    from gguf_run.runtime.engine.constraint import Constraint

Load = Callable[[str, Callable[[int, int], None]], Model]
FOR_EVER = -1.0  # seconds for which an idle model is kept
_WAIT_S = 30.0  # seconds that a request waits until another model may be unloaded
_PART = re.compile(r"-(\d{5})-of-\d{5}$", re.ASCII)  # of the name of a split file


class Served:
    """A model that is loaded, and what the server knows of it."""

    def __init__(self, name: str, model: Model, counts: Counts) -> None:
        self.name, self.model, self.counts, self.created = name, model, counts, int(time.time())
        template = model.tool_template or model.chat_template
        self.family: Family = family_of(template)
        self.shows_tools = template is None or "tools" in template  # the template has a place for them
        self.adapters: Mapping[str, float] | None = None  # scales of the requests by this name; None: as loaded
        self.base = self  # the model itself, where this is a view of it with other adapters
        # Of the base alone:
        self.n_users = 0  # requests that are under way
        self.used_at = time.monotonic()  # when the last one ended
        self.keep_alive: float | None = None  # seconds until it is unloaded; None: as the registry says

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

    def with_adapters(self, name: str, adapters: Mapping[str, float]) -> "Served":
        """Return a view of the model in which these adapters act, by this name."""
        view = copy.copy(self)
        view.name, view.adapters = name, adapters
        return view


class Registry:
    """Models by name."""

    def __init__(
        self,
        paths: Mapping[str, str | Path],
        load: Load,
        *,
        folder: Path | None = None,
        adapters: Mapping[str, Mapping[str, float]] = {},
        keep_alive: float = FOR_EVER,
        max_models: int = 1,
    ) -> None:
        """paths: of the models, by the names that clients use; the first one answers where none is named.

        load: makes a model from a path, and tells its progress in bytes.
        folder: GGUF files in it can be asked for, by their names without the ending.
        adapters: scales by the names of sets of adapters: "model:set" is the model with them. "" is the model alone.
        keep_alive: seconds after which an idle model is unloaded.
        max_models: models that are loaded together.
        """
        self._paths, self._load, self._folder, self._adapters = dict(paths), load, folder, adapters
        self.keep_alive, self.max_models = keep_alive, max(max_models, 1)
        self.loaded: dict[str, Served] = {}
        self.progress: dict[str, tuple[int, int]] = {}  # of models that are being loaded: bytes, of bytes
        self.counts: dict[str, Counts] = {}  # of models that have been loaded
        self.error: Exception | None = None  # why the first model cannot be loaded
        self._lock = asyncio.Lock()  # one model is loaded or unloaded at a time
        self._idle = asyncio.Event()  # a model has become idle
        self._is_closed = False

    @property
    def paths(self) -> dict[str, str | Path]:
        """All models by name. Files come and go in the folder."""
        return self._paths if self._folder is None else {**gguf_files(self._folder), **self._paths}

    @property
    def names(self) -> Sequence[str]:
        """All names that can be asked for."""
        sets = [f":{name}" if name else "" for name in self._adapters or [""]]
        return [name + suffix for name in self.paths for suffix in sets]

    def find(self, name: str | None) -> str:
        """Return the name of the model that a client means. HttpError 404 if there is none of this name.

        A server of one model answers to every name: many clients have one of their own.
        """
        names = self.names
        if name in names:
            return str(name)
        if names and (len(self.paths) == 1 or not name):
            return next(iter(self._paths or names))
        raise HttpError(404, f"model {name!r:.80} is not here: {', '.join(names) or 'none'} is", "model_not_found")

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Served]:
        """Load a model if it is not loaded, and keep it within the block. Errors: see `find` and `get`."""
        name = self.find(name)
        base, _, adapters = (name, "", "") if name in self.paths else name.rpartition(":")
        served = await self.get(base)
        served.n_users += 1
        try:
            yield served.with_adapters(name, self._adapters[adapters]) if self._adapters else served
        finally:
            served.n_users -= 1
            served.used_at = time.monotonic()
            self._idle.set()

    async def get(self, name: str) -> Served:
        """Return a model, which is loaded now.

        HttpError 500 if it cannot be loaded, 503 if all that are loaded stay in use.
        """
        if name not in self.loaded:
            async with self._lock:
                if name not in self.loaded:
                    await self._make_room()
                    self.loaded[name] = await asyncio.to_thread(self._make, name)
        return self.loaded[name]

    async def load_first(self) -> None:
        """Load the first model that the server was started with."""
        for name in [*self._paths][:1]:
            try:
                await self.get(name)
            except HttpError as error:
                self.error = error.__cause__ if isinstance(error.__cause__, Exception) else error

    async def unload_idle(self) -> None:
        """Unload, again and again, the models that nobody has used for long."""
        while True:
            await asyncio.sleep(0.5)
            for served in [*self.loaded.values()]:
                seconds = self.keep_alive if served.keep_alive is None else served.keep_alive
                if 0 <= seconds <= time.monotonic() - served.used_at:
                    async with self._lock:
                        await self._unload(served)

    async def _make_room(self) -> None:
        """Unload the model that has been idle for longest, if as many are loaded as may be."""
        try:
            async with asyncio.timeout(_WAIT_S):
                while len(self.loaded) >= self.max_models:
                    self._idle.clear()
                    served = min(self.loaded.values(), key=lambda served: (served.n_users > 0, served.used_at))
                    if not await self._unload(served):
                        await self._idle.wait()
        except TimeoutError:
            message = f"the models {', '.join(self.loaded)} are in use, and no other can be loaded beside them"
            raise HttpError(503, message, "models_busy", RETRY_AFTER) from None

    async def _unload(self, served: Served) -> bool:
        """Close a model, unless it is in use. Return whether it is closed."""
        if served.n_users or self.loaded.get(served.name) is not served:
            return False
        del self.loaded[served.name]  # first: nobody uses it from now on
        await asyncio.to_thread(served.model.close)
        return True

    def _make(self, name: str) -> Served:
        def tell(n: int, total: int) -> None:
            if self._is_closed:
                raise GgufRunError("the server is stopping")
            self.progress[name] = n, total

        tell(0, 1)
        try:
            model = self._load(str(self.paths[name]), tell)
        except Exception as error:
            raise HttpError(500, f"model {name} cannot be loaded: {error}", "model_not_loaded") from error
        finally:
            self.progress.pop(name, None)
        model.engine.start()
        if model.chat_template is not None:
            model.templates = TemplateProcess().start()
        return Served(name, model, self.counts.setdefault(name, Counts()))

    def check_ready(self) -> None:
        """HttpError 503 while the first model is being loaded and none is ready."""
        if not self.loaded and self.progress:
            n, total = next(iter(self.progress.values()))
            percent = f"{100 * n // max(total, 1)} %"
            raise HttpError(503, f"Loading model: {percent}", "unavailable_error", RETRY_AFTER, progress=percent)

    def close(self) -> None:
        """Close all models. One that is being loaded is given up."""
        self._is_closed = True
        for served in self.loaded.values():
            served.model.close()
        self.loaded.clear()

    def info(self) -> list[dict[str, Any]]:
        """Return the entries of /v1/models."""
        found = []
        for name in self.names:
            served = self.loaded.get(name) or self.loaded.get(name.rpartition(":")[0])
            n_ctx, created = (served.model.n_ctx, served.created) if served else (None, 0)
            kind = {"id": name, "object": "model", "owned_by": "gguf-run"}
            found.append({**kind, "created": created, "max_model_len": n_ctx})
        return found


def name_of(path: str) -> str:
    """Return the name of a model: of its file without the ending, and of a split file without the part's number."""
    name = re.split(r"[\\/]", path)[-1]
    return _PART.sub("", name[:-5] if name.lower().endswith(".gguf") else name)


def gguf_files(folder: Path) -> dict[str, str | Path]:
    """Return the GGUF files directly in a folder by their names. A split file is its first part."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf" and path.is_file())
    firsts = [path for path in paths if (match := _PART.search(path.stem)) is None or int(match[1]) == 1]
    return {name_of(path.name): path for path in firsts}
