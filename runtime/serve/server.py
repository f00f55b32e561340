"""What all requests to a server share."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

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


class Server:
    """What all requests share."""

    def __init__(
        self,
        registry: Registry,
        *,
        request_timeout: float = 0.0,
        access: Access = Access(),  # noqa: B008  (it cannot change)
        has_metrics: bool = False,
        has_slots: bool = False,
    ) -> None:
        """Nothing is loaded yet.

        request_timeout: seconds that an answer may take; 0: no limit.
        has_metrics, has_slots: /metrics and /slots tell counts.
        """
        self.registry, self.request_timeout = registry, request_timeout
        self.access, self.has_metrics, self.has_slots = access, has_metrics, has_slots
        self.n_running, self.is_stopping = 0, False  # requests; whether new ones are refused
        self.threads = ThreadPoolExecutor(_N_THREADS, "gguf-run prompt")
