"""What stands before the application: who may ask, how much, for how long. It writes a line for each request."""

import asyncio
import hmac
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.serve.errors import RETRY_AFTER, HttpError, api_of, http_error
from gguf_run.runtime.serve.http import encode, json_response
from gguf_run.runtime.serve.server import Server

if TYPE_CHECKING:
    from gguf_run.runtime.serve.answers import Answers

_WITHOUT_KEY = ("/", "/health", "/v1/health")  # and the page's files: probes and browsers have none
_ID = re.compile("[A-Za-z0-9._-]{1,64}", re.ASCII)


class Guard:
    """An application around the application."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server, self._keys = app, server, [key.encode() for key in server.access.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, start, status = Headers(scope=scope), time.monotonic(), 499
        given = headers.get("x-request-id", "")
        id = given if _ID.fullmatch(given) else token_hex(8)
        more = {"x-request-id": id}

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                new = [(name.encode(), value.encode("latin-1")) for name, value in more.items()]
                message["headers"] = [*message["headers"], *new]
            await send(message)

        self.server.n_running += 1
        try:
            refusal = self._refusal(scope, headers, more)
            if refusal is None:
                await self.app(scope, self._limited(receive), send_with_headers)
            else:
                await refusal(scope, receive, send_with_headers)
        finally:
            self.server.n_running -= 1
            if (log := self.server.access.log) is not None:
                ms = round(1000 * (time.monotonic() - start), 1)
                facts = {"id": id, "method": scope["method"], "path": scope["path"][:200], "status": status, "ms": ms}
                client = (scope.get("client") or ("",))[0]
                now = datetime.now(UTC).isoformat(timespec="milliseconds")
                log(encode({"time": now, "client": client, **facts, **_facts(scope)}).decode())

    def _refusal(self, scope: Scope, headers: Headers, more: dict[str, str]) -> Response | None:
        """Return the answer to a request that the application does not get. Add headers to `more`."""
        try:
            self._check_page(headers, more)
            if scope["method"] == "OPTIONS":
                return Response(None, 204)
            self._check(scope, headers)
        except HttpError as error:
            return json_response(error.body(api_of(scope["path"])), error.status, error.headers)
        return None

    def _check_page(self, headers: Headers, more: dict[str, str]) -> None:
        """Check the names of this server, and of the one whose page asks: a browser tells both."""
        access, hosts, origin = self.server.access, headers.getlist("host"), headers.get("origin")
        host = hosts[0].lower() if len(hosts) == 1 else ""
        name = _name(host)
        if access.hosts is not None and not any(
            name == allowed or (allowed.startswith("*.") and name.endswith(allowed[1:])) for allowed in access.hosts
        ):
            raise HttpError(403, f"the host {host!r:.80} is not this server's name: --allowed-host adds one")
        if origin is None or (host and origin.lower().partition("://")[2] == host):
            return
        if origin not in access.origins and "*" not in access.origins:
            raise HttpError(403, f"pages of {origin!r:.80} may not ask: --cors-origin allows one")
        more["access-control-allow-origin"] = "*" if "*" in access.origins else origin
        more["vary"] = "Origin"
        more["access-control-expose-headers"] = "x-request-id"
        if headers.get("access-control-request-method"):
            more["access-control-allow-methods"] = "GET, POST, DELETE"
            more["access-control-allow-headers"] = headers.get("access-control-request-headers", "*")
            more["access-control-max-age"] = "600"

    def _check(self, scope: Scope, headers: Headers) -> None:
        if self.server.is_stopping:
            raise HttpError(503, "the server is stopping", "stopping", {**RETRY_AFTER, "Connection": "close"})
        if self._keys and not (scope["path"] in _WITHOUT_KEY or scope["path"].startswith("/page/")):
            bearer = headers.get("authorization", "")
            given = (headers.get("x-api-key") or bearer[bearer.lower().startswith("bearer ") * 7 :]).strip().encode()
            found = [hmac.compare_digest(given, key) for key in self._keys]  # all of them, whichever it is
            if not any(found):
                message = "the key is missing or wrong: send `Authorization: Bearer KEY` or `x-api-key: KEY`"
                raise HttpError(401, message, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
            if len(found) > 1:  # the time of an answer must not tell what others have asked
                scope["gguf_run.salt"] = f"key {found.index(True)}"
        if headers.get("content-encoding", "identity") != "identity":
            raise HttpError(415, "the body has a Content-Encoding: send it as it is")
        length = headers.get("content-length", "0")
        if len(length) > 15 or int(length) > self.server.access.most_body:
            raise self._too_large()

    def _too_large(self) -> HttpError:
        return HttpError(413, f"the request's body has more than {self.server.access.most_body} bytes")

    def _limited(self, receive: Receive) -> Receive:
        """Return `receive` for a body that is neither too long nor too slow. HttpError 408 and 413."""
        end, n_bytes, has_more = time.monotonic() + self.server.access.body_s, 0, True

        async def receive_in_time() -> Message:
            nonlocal n_bytes, has_more
            if not has_more:
                return await receive()
            try:
                async with asyncio.timeout(end - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise HttpError(408, "the request's body did not come in time", "timeout") from None
            has_more = message.get("more_body", False)
            n_bytes += len(message.get("body", b""))
            if n_bytes > self.server.access.most_body:
                raise self._too_large()
            return message

        return receive_in_time


def read_keys(file: Path) -> list[str]:
    """Return the keys in a file: one on each line, beside empty lines and comments (#). GgufRunError for none."""
    found = [key for line in file.read_text("utf-8").splitlines() if (key := line.strip()) and key[0] != "#"]
    if not found:
        raise GgufRunError(f"{file}: holds no key: write one on each line")
    return found


def _name(host: str) -> str:
    """Return the name or address in a Host header, without its port; "" if it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _facts(scope: Scope) -> dict[str, Any]:
    """Return what the log tells of the answers to a request: no text of theirs."""
    facts: dict[str, Any] = {}
    if (error := scope.get("gguf_run.error")) is not None:  # within a stream
        facts["error"] = http_error(error).message
    answers: Answers | None = scope.get("gguf_run.answers")
    if answers is not None and answers.sequences:
        usage, job = answers.usage, answers.sequences[0].job
        facts |= {"model": answers.served.name, "n_prompt": usage.n_prompt, "n_cached": usage.n_cached}
        facts["n_decoded"] = usage.n_decoded
        facts |= {"note": answers.note[:200]} if answers.note else {}
        facts["ttft_ms"] = round(1000 * (job.first_at - job.arrived), 1) if job.n_chosen else None
    return facts
