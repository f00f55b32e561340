"""A client for answers that stream: it notes when each part of an answer comes.

It runs on the machine that it measures, so it is small: plain sockets, HTTP/1.1, a connection for each request.
"""

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.formats.frozen import frozen

_TEXTS = ("text", "content", "reasoning_content", "reasoning", "tool_calls")  # what holds tokens, in a choice


@frozen
class Target:
    """An OpenAI server."""

    host: str
    port: int
    is_tls: bool
    path: str  # "/v1", or another that ends so
    key: str

    @classmethod
    def of(cls, url: str, key: str = "") -> "Target":
        """OptionError if url is no address of HTTP, or if key cannot stand in a header. "http://" may be left out."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            parts, port = urlsplit(""), 0
        host, path = parts.hostname or " ", parts.path.rstrip("/")
        if parts.scheme not in ("http", "https") or not re.fullmatch("[!-~]+", host + path):
            raise OptionError(f"URL is {url!r}: must be as http://127.0.0.1:8080 or https://host/v1")
        if not (key.isascii() and key.isprintable()):
            raise OptionError("--api-key has characters that no key has: allowed is printable ASCII")
        return cls(host, port, parts.scheme == "https", path if path.endswith("/v1") else f"{path}/v1", key)

    def request(self, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """Return the bytes of a request: POST with a body, else GET."""
        data = b"" if body is None else json.dumps(body).encode()
        lines = [
            f"{'GET' if body is None else 'POST'} {self.path}{path} HTTP/1.1",
            f"Host: {f'[{self.host}]' if ':' in self.host else self.host}:{self.port}",
            "Connection: close",
            *([f"Authorization: Bearer {self.key}"] if self.key else []),
            *(["Content-Type: application/json", f"Content-Length: {len(data)}"] if data else []),
        ]
        return "\r\n".join([*lines, "", ""]).encode() + data


@dataclass
class Record:
    """What was seen of one answer. Times are in seconds of one clock."""

    sent: float = 0.0  # before the connection was made
    parts: list[float] = field(default_factory=list)  # when each event with text came
    n_prompt: int = 0  # tokens, as the server counts them; 0: it does not
    n_output: int = 0  # the same
    error: str = ""  # why there is no whole answer

    def figures(self) -> dict[str, list[float]]:
        """Return milliseconds of vLLM's figures, by name. An answer of one token has no tpot and no itl."""
        first, last, n = self.parts[0], self.parts[-1], self.n_output or len(self.parts)
        return {
            "ttft": [1e3 * (first - self.sent)],  # to the first event with text
            "tpot": [1e3 * (last - first) / (n - 1)] if n > 1 else [],  # of each further token
            "itl": [1e3 * (b - a) for a, b in pairwise(self.parts)],  # between events with text
            "e2el": [1e3 * (last - self.sent)],  # to the last event with text
        }


async def exchange(target: Target, request: bytes) -> AsyncGenerator[bytes, None]:
    """Send a request and yield the pieces of the answer's body.

    GgufRunError: there is no connection, or the server refuses. ValueError, EOFError: the answer is no whole HTTP/1.1.
    """
    try:
        reader, writer = await asyncio.open_connection(target.host, target.port, ssl=target.is_tls or None)
    except OSError as error:
        raise GgufRunError(f"no connection to {target.host}:{target.port}: {error}") from None
    try:
        writer.write(request)
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        version, status = first.split()[:2]
        if not version.startswith("http/1."):
            raise ValueError(f"the server speaks {version[:20]}, not HTTP/1.1")
        headers = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = _body(reader, headers)
        if int(status) != 200:
            raise GgufRunError(f"HTTP {status}: {_reason(b''.join([piece async for piece in body]))}")
        async for piece in body:
            yield piece
    except asyncio.LimitOverrunError as error:
        raise ValueError(str(error)) from None
    finally:
        writer.close()


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncGenerator[bytes, None]:
    """Yield the pieces of a body as they come. EOFError: it has no end."""
    is_chunked = "chunked" in headers.get("transfer-encoding", "")
    length = None if is_chunked else headers.get("content-length")
    while n_left := int((await reader.readuntil()).split(b";")[0], 16) if is_chunked else int(length or 1 << 62):
        while n_left and (piece := await reader.read(min(n_left, 1 << 16))):
            n_left -= len(piece)
            yield piece
        if n_left and (is_chunked or length):
            raise EOFError
        if not is_chunked:
            break
        await reader.readline()


def _reason(body: bytes) -> str:
    """Return the message of an error's body, or the body."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, TypeError, KeyError):
        return body[:200].decode(errors="replace")


async def ask(
    target: Target, path: str, body: Mapping[str, Any], record: Record, clock: Callable[[], float] = time.perf_counter
) -> None:
    """Send a request whose answer streams; note in record what comes, and when. What fails is its error."""
    record.sent, rest, data = clock(), b"", b""
    try:
        async with aclosing(exchange(target, target.request(path, body))) as pieces:
            async for piece in pieces:
                now = clock()
                *lines, rest = (rest + piece).split(b"\n")
                for data in (line[5:].strip() for line in lines if line.startswith(b"data:")):
                    if data != b"[DONE]":
                        _note(record, json.loads(data), now)
                if data == b"[DONE]":
                    break
        if data != b"[DONE]" or not record.parts:
            raise ValueError("the answer has no text" if data == b"[DONE]" else "the answer ended without [DONE]")
    except EOFError:
        record.error = "the connection ended before the answer did"
    except (OSError, GgufRunError, ValueError) as error:
        record.error = str(error)
    except (TypeError, AttributeError, LookupError) as error:
        record.error = f"the answer is not of OpenAI's form: {type(error).__name__}: {error}"


def _note(record: Record, event: Mapping[str, Any], now: float) -> None:
    """Note what an event says. GgufRunError: an error."""
    if event.get("error"):
        raise GgufRunError(_reason(json.dumps(event).encode()))
    if any((choice.get("delta") or choice).get(name) for choice in event.get("choices") or () for name in _TEXTS):
        record.parts.append(now)
    if usage := event.get("usage"):
        record.n_prompt, record.n_output = usage["prompt_tokens"], usage["completion_tokens"]
