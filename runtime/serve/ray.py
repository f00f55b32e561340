"""The server on many machines: Ray Serve runs replicas of it, and a front sends each request to one of them.

`serve run gguf_run.runtime.serve.ray:app_builder model=model.gguf replicas=2 threads=4`. It needs the extra `cluster`.
The replica that has computed the beginning of a prompt gets it, unless it is much busier than the others.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from gguf_run.formats.errors import GgufRunError, OptionError, check_names
from gguf_run.runtime.load.options import LoadOptions
from gguf_run.runtime.model import Model
from gguf_run.runtime.serve.app import answer_error, make_app
from gguf_run.runtime.serve.errors import HttpError
from gguf_run.runtime.serve.guard import Guard, read_keys
from gguf_run.runtime.serve.registry import Registry, name_of
from gguf_run.runtime.serve.server import Access, Server

try:
    from ray import serve
    from ray.serve.request_router import RequestRouter
except ImportError:  # without the extra, this file does nothing
    RequestRouter = object

_BLOCK, _MOST_BLOCKS = 256, 256  # characters, about a page of the cache; blocks of a prompt that are compared
_GRACE_S = 300.0  # seconds in which running answers may end before a replica does
_MOST_KNOWN = 100_000  # beginnings of which the front knows who has computed them
_PROMPT = ("model", "tools", "system", "instructions", "messages", "input", "prompt")  # in the order of templates
_SCOPE = {"type", "method", "path", "query_string", "headers", "gguf_run.salt"}  # what a replica is told


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    """What is deployed."""

    model: str  # a path that each machine has, or hf:owner/repo:TYPE
    replicas: int | dict[str, Any] = 1  # or Ray Serve's autoscaling_config, as {"min_replicas": 1, "max_replicas": 8}
    threads: int = 1  # of a replica, which gets so many CPUs
    load: dict[str, Any] = {}  # fields of LoadOptions, as {"n_ctx": 8192, "n_seq": 8}
    actor: dict[str, Any] = {}  # more of Ray's options of an actor, as {"num_gpus": 1}
    api_key_file: str = ""  # a file of keys that each machine has: clients must send one of them

    @property
    def options(self) -> LoadOptions:
        """OptionError for names and values that are not allowed."""
        check_names(self.load, (field.name for field in fields(LoadOptions)))
        return LoadOptions(**{"n_seq": 16, "cache_ram": "auto", "n_threads": self.threads, **self.load})


def app_builder(args: Mapping[str, Any]) -> Any:
    """Return the application for serve.run. args: the fields of Settings. OptionError for others.

    GgufRunError where Ray is missing.
    """
    if RequestRouter is object:
        raise GgufRunError('Ray is missing: pip install "gguf-run[cluster]"')
    try:
        settings = msgspec.convert(args, Settings, strict=False)
        n_seq = settings.options.n_seq
    except msgspec.ValidationError as error:
        raise OptionError(f"{error}; allowed: {', '.join(Settings.__struct_fields__)}") from None
    replica = serve.deployment(
        Replica,
        max_ongoing_requests=2 * n_seq,  # some wait there, so that no row of the cache does
        ray_actor_options={"num_cpus": settings.threads, **settings.actor},
        graceful_shutdown_timeout_s=_GRACE_S,
        request_router_config={"request_router_class": Router, "request_router_kwargs": {"most_ahead": n_seq // 2}},
        **{"num_replicas" if isinstance(settings.replicas, int) else "autoscaling_config": settings.replicas},
    )

    def front() -> Guard:
        keys = read_keys(Path(settings.api_key_file)) if settings.api_key_file else []
        app = Starlette(
            routes=[Route("/{path:path}", Front(serve.get_deployment_handle("Replica")))],
            exception_handlers=dict.fromkeys((HttpError, Exception), answer_error),
        )
        return Guard(app, Server(Registry({}, lambda path, _: Model.load(path)), access=Access(hosts=None, keys=keys)))

    make = serve.deployment(
        serve.ingress(front)(),
        name="Front",
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=_GRACE_S,
    )
    return make.bind(replica.bind(settings))


class Front:
    """An application that lets a replica answer."""

    def __init__(self, replicas: Any) -> None:
        self._ask = replicas.options(stream=True).ask

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and its answer back. Ray ends this, and the replica's work, when the client goes."""
        body = await Request(scope, receive).body()
        known = {name: value for name, value in scope.items() if name in _SCOPE}
        async for messages in self._ask.remote(beginnings(body), known, body):
            for message in messages:
                await send(message)


class Replica:
    """A server within an actor of Ray."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Ray waits for it
        name, load = name_of(settings.model), lambda path, tell: Model.load(path, settings.options, progress=tell)
        self._server = Server(Registry({name: settings.model}, load), access=Access(hosts=None))
        self._app = make_app(self._server)
        self._life = self._app.app.router.lifespan_context(self._app.app)  # type: ignore[attr-defined]
        await self._life.__aenter__()
        await self._server.registry.get(name)

    async def ask(self, _: list[int], scope: Scope, body: bytes) -> AsyncIterator[list[Message]]:
        """Yield the messages of an answer."""
        bodies, news = [{"type": "http.request", "body": body}], asyncio.Queue[Message]()

        async def receive() -> Message:
            if not bodies:
                await asyncio.Event().wait()  # for ever: Ray cancels this when the client goes
            return bodies.pop()

        task = asyncio.create_task(self._app(scope, receive, news.put))
        task.add_done_callback(lambda _: news.put_nowait({}))  # is no message
        try:
            while all(messages := [await news.get(), *(news.get_nowait() for _ in range(news.qsize()))]):
                yield messages
            yield messages[:-1]
        finally:
            task.cancel()

    def check_health(self) -> None:
        """RuntimeError if the last steps failed: Ray replaces the replica then."""
        if not all(served.model.engine.healthy for served in self._server.registry.loaded.values()):
            raise RuntimeError("the last steps of the model failed")


def beginnings(body: bytes) -> list[int]:
    """Return a number for each beginning of the prompt in a request's body. Prompts that begin alike have the same."""
    try:
        found = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return []
    text = msgspec.json.encode([found.get(name) for name in _PROMPT])[: _BLOCK * _MOST_BLOCKS]
    blocks = [text[i : i + _BLOCK] for i in range(0, len(text) - _BLOCK + 1, _BLOCK)]
    return [*accumulate(blocks, lambda before, block: hash((before, block)), initial=0)][1:]


class Router(RequestRouter):
    """Chooses the replica that answers a request."""

    def initialize_state(self, most_ahead: int) -> None:
        """most_ahead: so many more requests than the idlest replica may one have that has computed a beginning."""
        self.most_ahead, self.holders = most_ahead, dict[int, Any]()

    async def choose_replicas(self, candidate_replicas: Sequence[Any], pending_request: Any = None) -> list[list[Any]]:
        """Return the replica that knows the longest beginning, then all, of which Ray takes the idlest."""
        everyone = random.sample(candidate_replicas, len(candidate_replicas))
        if pending_request is None:
            return [everyone]
        pending_request.routing_context.should_backoff = True  # else full replicas are asked again and again, at once
        loads = {one.replica_id: self.replica_queue_len_cache.get(one.replica_id) or 0 for one in everyone}
        known = (self.holders.get(number) for number in reversed(pending_request.args[0]))
        holder = next((id for id in known if id in loads), None)
        most = min(loads.values()) + self.most_ahead
        return [[one for one in everyone if one.replica_id == holder and loads[holder] <= most], everyone]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """Note who computes the beginnings of a request."""
        for number in pending_request.args[0]:
            self.holders.pop(number, None)  # the order is that of the last use
            self.holders[number] = replica_id
        while len(self.holders) > _MOST_KNOWN:
            del self.holders[next(iter(self.holders))]
