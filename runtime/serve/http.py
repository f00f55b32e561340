"""Bodies in, answers out: whole ones, and streams that end when the client goes away."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from gguf_run.runtime.serve.answers import Answers, Event, Whole, wholes
from gguf_run.runtime.serve.ask import Ask
from gguf_run.runtime.serve.errors import HttpError, http_error

_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies pass each chunk on at once
encode = msgspec.json.encode


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a response of JSON."""
    return Response(encode(content), status, headers, "application/json")


async def read_json(request: Request) -> dict[str, Any]:
    """Return the body of a request, which is an object of JSON whatever its content type says. HttpError 400."""
    try:
        found = msgspec.json.decode(await request.body())
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise HttpError(400, f"the request's body is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise HttpError(400, "the request's body is no object of JSON, as {...}")
    return found


async def in_thread(request: Request, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns that takes a while, such as one that tokenizes."""
    threads = request.app.state.server.threads
    return await asyncio.get_running_loop().run_in_executor(threads, function, *arguments)


def get(path: str, handler: Callable[[Request], Awaitable[Any]]) -> Route:
    """Return a route to a handler, whose result is sent as JSON."""

    async def endpoint(request: Request) -> Response:
        return json_response(await handler(request))

    return Route(path, endpoint)


def post(path: str, handler: Callable[[Request, dict[str, Any]], Awaitable[Any]]) -> Route:
    """Return a route to a handler of a request and its body. Its result is a response, or is sent as JSON."""

    async def endpoint(request: Request) -> Response:
        found = await handler(request, await read_json(request))
        return found if isinstance(found, Response) else json_response(found)

    return Route(path, endpoint, methods=["POST"])


class Writer:
    """Writes the answers to an ask in the form of an API: whole, or as a stream of `begin`, pushes, and `end`."""

    media_type = "text/event-stream"
    quiet = b": still at work\n\n"  # sent now and then where there is no news

    def __init__(self, answers: Answers) -> None:
        self.answers = answers

    def whole(self, found: Sequence[Whole]) -> dict[str, Any]:
        """Return what is sent where nobody asked for a stream."""
        raise NotImplementedError

    def begin(self) -> bytes:
        """Return what is sent before all events."""
        return b""

    def push(self, event: Event) -> bytes:
        """Return what is sent of an event."""
        raise NotImplementedError

    def end(self) -> bytes:
        """Return what is sent when all answers have come to their ends."""
        return b""

    def failed(self, error: HttpError) -> bytes:
        """Return what is sent of an error that comes within the stream."""
        return sse(error.body("openai"))


async def answer(request: Request, ask: Ask, make: Callable[[Answers], Writer]) -> Response:
    """Return the answers to an ask as `make`'s writer writes them. They end when the client goes away.

    Errors before the first byte are raised: those of Answers.start, and HttpError 404 and 503 as for the registry.
    """
    server = request.app.state.server
    async with AsyncExitStack() as stack:
        served = await stack.enter_async_context(server.registry.use(ask.model))
        key = request.scope.get("gguf_run.salt", "")
        answers: Answers = await in_thread(request, Answers.start, served, ask, key)
        stack.callback(answers.close)
        if server.request_timeout:
            answers.limit(server.request_timeout)
        request.scope["gguf_run.answers"] = answers  # for the log
        writer = make(answers)
        if ask.is_stream:
            return _Stream(writer, stack.pop_all())
        with _watch(request.receive, answers):
            return json_response(writer.whole(await wholes(answers)))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@contextmanager
def _watch(receive: Receive, answers: Answers) -> Iterator[asyncio.Future[None]]:
    """Close the answers when the client goes away within the block."""
    watch = asyncio.ensure_future(_gone(receive))
    watch.add_done_callback(lambda _: answers.close())
    try:
        yield watch
    finally:
        watch.cancel()


class _Stream(Response):
    """A response that is sent while the answers are made. stack: ends them, and holds the model until then."""

    def __init__(self, writer: Writer, stack: AsyncExitStack) -> None:
        super().__init__(None, 200, _STREAM_HEADERS, writer.media_type)
        self.raw_headers = [header for header in self.raw_headers if header[0] != b"content-length"]
        self._writer, self._stack = writer, stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            with _watch(receive, self._writer.answers) as watch:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                try:
                    await self._write(send)
                except OSError:  # the client is gone
                    return
                except Exception as error:
                    scope["gguf_run.error"] = error
                    await send(_part(self._writer.failed(http_error(error))))
                if not watch.done():
                    await send(_part(b"", more=False))

    async def _write(self, send: Send) -> None:
        writer = self._writer
        await send(_part(writer.begin()))
        async for events in writer.answers:
            await send(_part(b"".join([writer.push(event) for event in events]) or writer.quiet))
        if writer.answers.is_finished:
            await send(_part(writer.end()))


def _part(body: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


def sse(content: Any, event: str = "") -> bytes:
    """Return an event of a stream. event: its name, for the APIs that give one."""
    name = f"event: {event}\n".encode() if event else b""
    return b"%bdata: %b\n\n" % (name, encode(content))
