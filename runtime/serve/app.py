"""The server as an ASGI application: the routes of all APIs, and what they share."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.serve import (
    anthropic,
    llama_server,
    metrics,
    ollama,
    openai_chat,
    openai_other,
    openai_text,
    page,
    responses,
)
from gguf_run.runtime.serve.errors import HttpError, api_of, http_error
from gguf_run.runtime.serve.guard import Guard
from gguf_run.runtime.serve.http import json_response
from gguf_run.runtime.serve.server import Server

# A thread that has computed without Python's lock gets it back after so many seconds, where others use it too. Python's
# own 0.005 would cost that much of each step.
_SWITCH_S = 0.0002


_APIS = (openai_chat, openai_text, openai_other, responses, anthropic, ollama, llama_server, metrics, page)


def make_app(server: Server) -> Guard:
    """Return the application. The first model is loaded when it starts; all are closed when it ends."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        before = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_S)
        tasks = [asyncio.create_task(work) for work in (server.registry.load_first(), server.registry.unload_idle())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            server.threads.shutdown(cancel_futures=True)
            server.registry.close()
            sys.setswitchinterval(before)

    app = Starlette(
        routes=[route for api in _APIS for route in api.routes],
        exception_handlers=dict.fromkeys((HttpError, GgufRunError, HTTPException, Exception), answer_error),
        lifespan=lifespan,
    )
    app.state.server = server
    return Guard(app, server)


async def answer_error(request: Request, error: Exception) -> Response:
    """Return the answer that an error makes, in the form of the API that was asked."""
    if isinstance(error, HTTPException):
        message = f"{request.method} {request.url.path}: {error.detail}"
        error = HttpError(error.status_code, message, headers=error.headers)
    found = http_error(error)
    api = api_of(request.url.path)
    status = 529 if api == "anthropic" and found.status == 503 else found.status  # its word for a server that is busy
    # uvicorn closes the connection after an error that nobody expected: the client must not use it again.
    headers = {**found.headers, "Connection": "close"} if found.code == "internal_error" else found.headers
    return json_response(found.body(api), status, headers)
