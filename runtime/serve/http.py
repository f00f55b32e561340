"""Bodies in, answers out: whole ones, and streams that end when the client goes away."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gguf_run.runtime.serve.answers import Answers, Whole, wholes
from gguf_run.runtime.serve.ask import Ask
from gguf_run.runtime.serve.errors import HttpError, http_error
from gguf_run.runtime.serve.registry import Served

Chunks = AsyncIterator[bytes]
EVENT_STREAM, LINES = "text/event-stream", "application/x-ndjson"
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


async def gone(receive: Receive) -> None:
    """Wait until the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def begin(request: Request, ask: Ask, stack: AsyncExitStack) -> Answers:
    """Begin the answers to an ask. They end with `stack`, which also holds the model.

    Errors as for Answers.start, and HttpError 404 and 503 as for the registry.
    """
    server = request.app.state.server
    served: Served = await stack.enter_async_context(server.registry.use(ask.model))
    answers: Answers = await in_thread(request, Answers.start, served, ask)
    stack.callback(answers.close)
    if server.request_timeout:
        answers.limit(server.request_timeout)
    request.scope["gguf_run.answers"] = answers  # for the log
    return answers


async def whole_answers(request: Request, ask: Ask) -> tuple[Answers, list[Whole]]:
    """Return the whole answers to an ask. They end when the client goes away."""
    async with AsyncExitStack() as stack:
        watch = asyncio.ensure_future(gone(request.receive))
        stack.callback(watch.cancel)
        answers = await begin(request, ask, stack)
        watch.add_done_callback(lambda _: answers.close())
        return answers, await wholes(answers)


async def stream(
    request: Request,
    ask: Ask,
    chunks: Callable[[Answers], Chunks],
    error_chunk: Callable[[HttpError], bytes],
    media_type: str = EVENT_STREAM,
) -> Response:
    """Return a response that is sent while the answers are made.

    chunks: makes the bytes to send of the answers; b"" tells the client that they are still at work.
    error_chunk: makes the bytes of an error that comes later. Errors before the first byte are raised.
    """
    stack = AsyncExitStack()
    try:
        answers = await begin(request, ask, stack)
    except BaseException:
        await stack.aclose()
        raise
    return _Stream(answers, chunks(answers), error_chunk, media_type, stack)


class _Stream(Response):
    def __init__(
        self,
        answers: Answers,
        chunks: Chunks,
        error_chunk: Callable[[HttpError], bytes],
        media_type: str,
        stack: AsyncExitStack,
    ) -> None:
        super().__init__(None, 200, _STREAM_HEADERS, media_type)
        self.raw_headers = [header for header in self.raw_headers if header[0] != b"content-length"]
        self._answers, self._chunks, self._error_chunk, self._stack = answers, chunks, error_chunk, stack
        self._quiet = b": still at work\n\n" if media_type == EVENT_STREAM else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.ensure_future(gone(receive))
        watch.add_done_callback(lambda _: self._answers.close())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for chunk in self._chunks:
                    if chunk or self._quiet:
                        await send({"type": "http.response.body", "body": chunk or self._quiet, "more_body": True})
            except OSError:  # the client is gone
                return
            except Exception as error:
                found = http_error(error)
                scope["gguf_run.error"] = error
                await send({"type": "http.response.body", "body": self._error_chunk(found), "more_body": True})
            if not watch.done():
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watch.cancel()
            await self._stack.aclose()


def sse(content: Any, event: str = "") -> bytes:
    """Return an event of a stream. event: its name, for the APIs that give one."""
    name = f"event: {event}\n".encode() if event else b""
    return b"%bdata: %b\n\n" % (name, encode(content))
