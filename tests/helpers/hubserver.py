"""A small HTTP server with the part of the Hugging Face hub's protocol that the download of one file needs.

HEAD or GET /owner/repo/resolve/main/file: status, ETag, size and commit; large files redirect to another host name.
GET /api/models/owner/repo: the files. GET /storage/...: the bytes, from `Range` on, without any token.
A test can make the server stop in the middle of a file and wait.
"""

import hashlib
import json
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PATIENCE = 120  # seconds


@dataclass
class Request:
    method: str
    path: str
    authorization: str | None
    range: str | None


@dataclass
class Hub:
    """The server; use it as a context manager."""

    files: dict[str, bytes]  # by "owner/repo/file"
    token: str | None = None  # asked of each request for a repository
    stall_after: int | None = None  # bytes of the storage's next answer before it waits for the end of the test
    truncates: bool = False  # the storage sends half of each file
    swells: bool = False  # the storage sends zeros behind each file, without a length, until the client goes away
    headers: dict[str, str | None] = field(default_factory=dict)  # in place of what describes a file; None: left out
    over: threading.Event = field(default_factory=threading.Event)
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> "Hub":
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                _answer(hub, self)

            def do_GET(self) -> None:
                _answer(hub, self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def _answer(hub: Hub, handler: BaseHTTPRequestHandler) -> None:
    headers = handler.headers
    hub.requests.append(Request(handler.command, handler.path, headers["Authorization"], headers["Range"]))
    if handler.path.startswith("/storage/"):
        _send_file(hub, handler, hub.files[handler.path.removeprefix("/storage/")])
        return
    if handler.path.startswith("/api/models/"):
        if hub.token is not None and "gated" not in handler.path and headers["Authorization"] != f"Bearer {hub.token}":
            _send(handler, 401, {"X-Error-Code": "RepoNotFound"})  # for what may not be seen, and what is not there
            return
        repo = handler.path.removeprefix("/api/models/") + "/"
        if "forbidden" in repo:
            _send(handler, 403, {})
            return
        names = [name.removeprefix(repo) for name in hub.files if name.startswith(repo)]
        error = {} if names else {"X-Error-Code": "RepoNotFound"}
        body = {"id": repo.strip("/"), "siblings": [{"rfilename": name} for name in names]}
        _send(handler, 404 if error else 200, error, b"" if error else json.dumps(body).encode())
        return
    repo, _, file = handler.path.strip("/").partition("/resolve/main/")
    name = f"{repo}/{file}"
    if hub.token is not None and headers["Authorization"] != f"Bearer {hub.token}":
        _send(handler, 401, {"X-Error-Code": "GatedRepo"} if "gated" in repo else {})
    elif not any(known.startswith(f"{repo}/") for known in hub.files):
        _send(handler, 404, {"X-Error-Code": "RepoNotFound"})
    elif name not in hub.files:
        _send(handler, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
    else:
        data = hub.files[name]
        described = {"X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(data)), "ETag": '"etag-of-the-pointer"'}
        described["X-Linked-Etag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        described = {key: value for key, value in (described | hub.headers).items() if value is not None}
        # "localhost" and "127.0.0.1" are two hosts to a client, as the hub and its storage are.
        _send(handler, 302, described | {"Location": f"http://localhost:{hub.port}/storage/{name}"})


def _send(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes = b"") -> None:
    handler.send_response(status)
    for name, value in (headers | {"Content-Length": str(len(body))}).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def _send_file(hub: Hub, handler: BaseHTTPRequestHandler, data: bytes) -> None:
    start = 0
    if handler.headers["Range"]:
        start = int(handler.headers["Range"].removeprefix("bytes=").partition("-")[0])
    body = data[start : len(data) // 2 if hub.truncates else None]
    if hub.swells:
        handler.send_response(200)
        handler.end_headers()
        with suppress(OSError):
            handler.wfile.write(body)
            while not hub.over.is_set():
                handler.wfile.write(bytes(1 << 20))
        return
    handler.send_response(206 if start else 200)
    handler.send_header("Content-Length", str(len(body)))
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
    handler.end_headers()
    if hub.stall_after is not None:
        n_first, hub.stall_after = hub.stall_after, None
        handler.wfile.write(body[:n_first])
        hub.over.wait(PATIENCE)
        return
    handler.wfile.write(body)
