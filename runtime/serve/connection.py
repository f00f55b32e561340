"""A connection: what may stay open, and for how long. uvicorn itself lets a client hold one for ever."""

import asyncio
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_CONNECTIONS = 900  # files are often limited to 1,024
MOST_HEAD = 64 << 10  # bytes of a request before its body
HEAD_S = 15.0  # seconds in which they must come
LINGER_S = 5.0  # seconds that the rest of a body may take after the answer
STALL_S = 60.0  # seconds for which a client may read nothing of its answer
KEEP_ALIVE_S = 75  # seconds between two requests
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n"
_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\n"


class Connection(HttpToolsProtocol):
    """A connection with limits. `_turn` is even while a head is read, odd while a body is."""

    _turn = _n_head = 0
    _clock: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            self._refuse(_FULL)
        else:
            self._limit(HEAD_S)

    def data_received(self, data: bytes) -> None:
        before = self._turn
        super().data_received(data)
        if self._turn != before:
            self._n_head = 0
        elif before % 2 == 0 and not self.transport.is_closing():
            self._n_head += len(data)
            if self._n_head > MOST_HEAD:
                self._refuse(_LONG)
            elif self._clock is None:
                self._limit(HEAD_S)

    def on_headers_complete(self) -> None:
        self._turn += 1
        self._limit(None)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._turn += 1
        self._limit(None)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._turn % 2:
            self._limit(LINGER_S)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(STALL_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._limit(None)
        super().connection_lost(exc)

    def _limit(self, seconds: float | None) -> None:
        """Close the connection in so many seconds; None: do not."""
        if self._clock is not None:
            self._clock.cancel()
        self._clock = None if seconds is None else self.loop.call_later(seconds, self._end)

    def _end(self) -> None:
        self._clock = None
        if self.cycle is None or self.cycle.response_complete:  # else the head is the next request's
            self.transport.abort()

    def _refuse(self, status: bytes) -> None:
        self.transport.write(status + b"Connection: close\r\nContent-Length: 0\r\n\r\n")
        self.transport.close()


def make_config(app: Any, **settings: Any) -> Config:
    """Return uvicorn's settings for an application. settings: of uvicorn.Config, as its addresses and certificates."""
    return Config(
        app, http=Connection, ws="none", log_level="error", access_log=False, server_header=False, proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S, **settings,
    )  # fmt: skip
