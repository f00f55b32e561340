"""What all requests to a server share."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from gguf_run.formats.frozen import frozen
from gguf_run.runtime.serve.registry import Registry

LOOPBACK = ("localhost", "*.localhost", "127.0.0.1", "::1")
_N_THREADS = 8  # that make prompts of messages


@frozen
class Access:
    """Who may ask, and how much."""

    hosts: Sequence[str] | None = LOOPBACK  # names by which the server may be called; None: any
    origins: Sequence[str] = ()  # of pages of other servers, which may ask; "*": of any
    keys: Sequence[str] = ()  # one of them must be named; none: everybody may ask
    most_body: int = 32 << 20  # bytes of a body
    body_s: float = 60.0  # seconds in which it must come
    log: Callable[[str], None] | None = None  # takes a line of JSON for each request; None: nobody does


@dataclass
class Server:
    """What all requests share."""

    registry: Registry
    access: Access = field(default_factory=Access)
    request_timeout: float = 0.0  # seconds that an answer may take; 0: no limit
    has_metrics: bool = False  # whether /metrics tells counts
    has_slots: bool = False  # whether /slots does
    is_stopping: bool = False  # whether new requests are refused
    n_running: int = 0  # requests
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_N_THREADS, "gguf-run prompt"))
