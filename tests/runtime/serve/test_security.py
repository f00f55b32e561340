"""What a hostile client tries: each request gets its own answer or an error, and the server goes on."""

import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("httptools")
pytest.importorskip("starlette")
from served import Serving, scripted, serving  # noqa: E402

from gguf_run.runtime.serve import connection  # noqa: E402
from gguf_run.runtime.serve.server import Access  # noqa: E402

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Say hello"}], "max_tokens": 3}
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE")
KEYS = ("first secret", "second secret")


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    access = Access(body_s=1.0, most_body=1 << 20, origins=("https://chat.example.org",))
    with serving(lambda: scripted(n_ctx=512), access=access) as server:
        yield server
        assert alive(server)
        assert server.model.engine.healthy


@pytest.fixture(scope="module")
def locked() -> Iterator[Serving]:
    with serving(scripted(n_ctx=512), access=Access(keys=KEYS), has_metrics=True) as server:
        yield server


def alive(server: Serving) -> bool:
    found: bool = httpx.post(server.url + CHAT, json=BODY).json()["choices"][0]["message"]["content"] == "Hel"
    return found


def raw(server: Serving, *parts: bytes, until: bytes = b"") -> bytes:
    """Send bytes; return what comes back until the server closes, or until `until` has come."""
    with socket.create_connection((server.host, server.port), timeout=20) as connection:
        for part in parts:
            connection.sendall(part)
        found = b""
        while not (until and until in found):
            try:
                new = connection.recv(1 << 16)
            except ConnectionResetError:
                break
            if not new:
                break
            found += new
    return found


def request(body: bytes, *headers: str, method: str = "POST", path: str = CHAT, host: str = "localhost") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def routes(server: Serving) -> list[Any]:
    found: list[Any] = server.uvicorn.config.app.app.routes  # type: ignore[union-attr]
    return found


def test_no_route_without_a_key(locked: Serving) -> None:
    """Each route, and each method, but the probe and the page."""
    seen = set()
    for route in routes(locked):
        path = route.path.replace("{name:path}", "x").replace("{", "").replace("}", "").replace(":path", "")
        if route.path in ("/", "/page/{name:path}", "/health", "/v1/health"):
            continue
        for method in route.methods:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"x-api-key": ""}, {"Authorization": KEYS[0][:-1]}):
                found = httpx.request(method, locked.url + path, headers=headers)
                assert found.status_code == 401, (method, path)
                assert method == "HEAD" or "key" in found.text
            seen.add(path)
        assert httpx.get(f"{locked.url}{path}?api_key={KEYS[0]}").status_code == 401
    assert {CHAT, "/metrics", "/v1/models"} <= seen
    assert httpx.get(locked.url + "/nothing/here").status_code == 401


def test_each_key_opens_in_both_headers(locked: Serving) -> None:
    for key in KEYS:
        for headers in ({"Authorization": f"Bearer {key}"}, {"Authorization": f"bearer {key}"}, {"x-api-key": key}):
            assert httpx.post(locked.url + CHAT, json=BODY, headers=headers).status_code == 200


def test_keys_and_salts_share_no_pages(locked: Serving) -> None:
    """The same prompt is known to the one who has asked it, and to nobody else."""
    body = BODY | {"messages": [{"role": "user", "content": "secret " * 30}]}

    def cached(key: str, **more: str) -> int:
        answer = httpx.post(locked.url + CHAT, json=body | more, headers={"x-api-key": key})
        n: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return n

    asked = [("first secret", {}), ("second secret", {}), ("first secret", {"cache_salt": "a"}),
             ("second secret", {"cache_salt": "a"}), ("first secret", {"cache_salt": "b"})]  # fmt: skip
    assert [cached(key, **more) for key, more in asked] == [0] * 5
    assert all(cached(key, **more) > 100 for key, more in asked)


NAMES = [("localhost", True), ("127.0.0.1:80", True), ("[::1]:8080", True), ("chat.localhost", True),
         ("LOCALHOST", True), ("evil.example", False), ("localhost.evil.example", False), ("127.0.0.1.nip.io", False),
         ("evillocalhost", False), ("", False), ("[::1", False), ("0.0.0.0", False),
         ("localhost@evil.example", False)]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_names_of_the_server(server: Serving, method: str) -> None:
    """A page of another name that resolves to this machine is refused (DNS rebinding), with any method and Origin."""
    for host, is_allowed in NAMES:
        for origin in ((), (f"Origin: http://{host}",)):
            found = raw(server, request(b"{}", "Connection: close", *origin, method=method, host=host, path="/x"))
            assert (b" 403 " not in found.splitlines()[0]) == is_allowed, (host, found)
    twice = raw(server, request(b"", "Host: evil.example", "Connection: close", method=method))
    assert b" 403 " in twice.splitlines()[0]
    none = f"{method} / HTTP/1.1\r\nConnection: close\r\n\r\n".encode()
    assert b" 403 " in raw(server, none).splitlines()[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("origin", "status"), [
    ("https://chat.example.org", True), ("https://evil.example", False), ("null", False), ("", False),
    ("https://chat.example.org.evil.example", False), ("https://chat.example.org:444", False),
])  # fmt: skip
def test_pages_of_others(server: Serving, method: str, origin: str, status: bool) -> None:
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    found = httpx.request(method, server.url + CHAT, headers=headers)
    assert (found.status_code != 403) == status
    names = {name for name in found.headers if name.startswith("access-control-")}
    assert ("access-control-allow-origin" in names) == status
    assert "access-control-allow-credentials" not in names
    if status:
        assert found.headers["access-control-allow-origin"] == origin
        assert found.headers["access-control-allow-headers"] == "x-api-key"
    assert "access-control-allow-origin" not in httpx.get(server.url + "/v1/models").headers
    same = httpx.get(server.url + "/v1/models", headers={"Origin": server.url})
    assert same.status_code == 200
    assert "access-control-allow-origin" not in same.headers


WRONG = [-1, 0, 1, 2**31 - 1, 2**31, 2**63, 2**64, -(2**63), 1e308, -1e308, 1e-320, "5", "", True, None, [], {}, [1],
         {"a": 1}]  # fmt: skip
_CHAT = """n max_tokens max_completion_tokens temperature top_k top_p min_p typical_p seed stop logprobs top_logprobs
    logit_bias presence_penalty frequency_penalty repeat_penalty repeat_last_n repetition_penalty mirostat mirostat_tau
    mirostat_eta dry_multiplier dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers xtc_probability
    xtc_threshold top_n_sigma dynatemp_range dynatemp_exponent samplers adaptive_target adaptive_decay ignore_eos stream
    stream_options tools tool_choice parallel_tool_calls response_format json_schema grammar structured_outputs model
    chat_template_kwargs reasoning_effort cache_salt best_of echo messages prompt num_ctx n_discard n_keep
    context_shift priority adapters salt skip_special"""
_OLLAMA = {"stream": False, "options": {"num_predict": 3}}
FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    CHAT: (BODY, _CHAT),
    "/v1/completions": (
        {"prompt": "abc", "max_tokens": 3},
        "n best_of logprobs max_tokens prompt suffix echo stop seed",
    ),
    "/v1/embeddings": ({"input": "abc"}, "input dimensions encoding_format model"),
    "/v1/rerank": ({"query": "a", "documents": ["b"]}, "query documents top_n"),
    "/v1/messages": (BODY, "max_tokens messages system stop_sequences temperature top_k tools tool_choice thinking"),
    "/v1/responses": (
        {"input": "Say hello", "max_output_tokens": 16},
        "input max_output_tokens tools tool_choice text reasoning temperature previous_response_id stream",
    ),
    "/completion": ({"prompt": "abc", "n_predict": 3}, "prompt n_predict n_probs n_keep id_slot seed"),
    "/infill": ({"input_prefix": "a", "input_suffix": "b", "n_predict": 3}, "input_prefix input_extra n_predict"),
    "/tokenize": ({"content": "abc"}, "content add_special"),
    "/detokenize": ({"tokens": [97]}, "tokens"),
    "/apply-template": (BODY, "messages"),
    "/api/chat": (BODY | _OLLAMA, "messages options format think tools keep_alive stream"),
    "/api/generate": ({"prompt": "a", **_OLLAMA}, "prompt system options format suffix raw context"),
    "/api/embed": ({"input": "a"}, "input truncate dimensions"),
    "/api/show": ({"model": "m0"}, "model"),
}


@pytest.mark.parametrize("path", FIELDS)
def test_values_out_of_range(server: Serving, path: str) -> None:
    """Each value in each field is taken or refused: no fault inside, and the next request is answered."""
    if path not in {route.path for route in routes(server)}:
        pytest.skip(f"this server has no {path}")
    body, names = FIELDS[path]
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for name in names.split():
            for value in WRONG:
                if name in ("max_tokens", "max_completion_tokens", "n_predict", "max_output_tokens") and value is None:
                    continue  # as many as the context holds
                found = client.post(path, json={**body, name: value})
                allowed = (200, 400, 404, 501)  # no such model; not this model's
                assert found.status_code in allowed, (name, value, found.status_code, found.text[:300])
        assert client.post(path, content=b"{}").status_code in (200, 400, 501)
    assert alive(server)
    assert server.model.engine.healthy


DEEP = 100_000
BOMBS = {
    "brackets": b"[" * DEEP, "closed": b"[" * DEEP + b"]" * DEEP, "objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "deep schema": json.dumps({**BODY, "x": 0}).encode()[:-2] + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}",
    "no JSON": b"\xff\xfe", "surrogate": b'{"messages": "\\ud800"}', "number": b'{"messages": ' + b"9" * DEEP + b"}",
    "empty": b"", "null": b"null", "NaN": b'{"messages": NaN}',
    "text": b'{"messages": [{"role": "user", "content": "' + b"a" * 500_000 + b'"}]}',
    "roles": json.dumps({"messages": [{"role": "x" * 1000, "content": "y"}] * 100}).encode(),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bodies_that_are_bombs(server: Serving, name: str) -> None:
    for path in (CHAT, "/v1/completions", "/v1/messages", "/v1/responses", "/v1/embeddings", "/api/chat"):
        found = raw(server, request(BOMBS[name], "Connection: close", path=path))
        assert found.split(b" ")[1] in (b"400", b"404"), found[:300]
    assert alive(server)


def test_bodies_that_are_too_large_or_packed(server: Serving) -> None:
    too_large = b" 413 "
    assert too_large in raw(
        server, request(b"", "Connection: close").replace(b"Length: 0", b"Length: 1048577"), until=b"}"
    )
    for length in (b"9" * 40, b"-1", b"1, 1", b"0x10", "٣".encode()):
        answer = raw(
            server, request(b"", "Connection: close").replace(b"Length: 0", b"Length: " + length), until=b"400"
        )
        assert answer.split(b" ")[1] in (b"400", b"413")
    head = request(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    chunk = b"%x\r\n%b\r\n" % (1 << 16, b" " * (1 << 16))
    assert too_large in raw(server, head, *[chunk] * 17, until=b"}")
    for encoding in ("gzip", "br", "zstd", "deflate, gzip"):
        assert b" 415 " in raw(server, request(b"\x1f\x8b", f"Content-Encoding: {encoding}"), until=b"}")
    both = request(b"", "Transfer-Encoding: chunked", "Connection: close")  # two lengths: a way to smuggle a request
    assert b" 400 " in raw(server, both, b"0\r\n\r\n").splitlines()[0]


@pytest.mark.parametrize("head", [
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * (1 << 20), b"GET /" + b"a" * (1 << 20),
    b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 100_000,
])  # fmt: skip
def test_heads_without_an_end(server: Serving, head: bytes) -> None:
    with socket.create_connection((server.host, server.port), timeout=20) as client:
        n_sent = 0
        with suppress(OSError):  # the server closes
            while n_sent < 8 << 20:
                client.sendall(head[:4096])
                head, n_sent = head[4096:] or b"a" * 4096, n_sent + 4096
                time.sleep(0.0005)
    assert n_sent < 8 << 20
    assert alive(server)


def test_slow_clients(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody holds a connection: without a word, with a head or a body that never ends, or with empty lines."""
    monkeypatch.setattr(connection, "HEAD_S", 0.3)
    monkeypatch.setattr(connection, "LINGER_S", 0.3)
    assert raw(server, b"") == b""
    assert raw(server, b"GET / HTTP/1.1\r\nHost: local") == b""
    assert raw(server, b"\r\n", b"\r\n") == b""
    whole = request(json.dumps(BODY).encode())
    assert b"HTTP/1.1 408" in raw(server, whole[:-5])[:20]
    assert b"HTTP/1.1 404" in raw(server, whole[:-5].replace(CHAT.encode(), b"/nowhere"))[:20]
    chunked = request(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    assert b"HTTP/1.1 408" in raw(server, chunked, b"5\r\nab")[:20]
    assert server.server.n_running == 0


def test_connections_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MOST_CONNECTIONS", 3)

    def wait_for(n: int) -> None:
        until = time.monotonic() + 30
        while len(server.uvicorn.server_state.connections) != n and time.monotonic() < until:
            time.sleep(0.01)

    with serving(scripted(n_ctx=512)) as server:
        held = [socket.create_connection((server.host, server.port)) for _ in range(3)]
        wait_for(3)
        assert b" 503 " in raw(server, b"")
        held[0].close()
        wait_for(2)
        assert alive(server)
        for one in held:
            one.close()


def test_a_client_that_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALL_S", 0.3)
    with serving(scripted({"": "x" * 3000}, n_ctx=4096), access=Access()) as server:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.connect((server.host, server.port))
            body = json.dumps(
                {**BODY, "max_tokens": 3000, "stream": True, "n": 4, "logprobs": True, "top_logprobs": 20}
            ).encode()
            client.sendall(request(body))
            until = time.monotonic() + 30
            while server.uvicorn.server_state.connections and time.monotonic() < until:
                time.sleep(0.01)
            assert not server.uvicorn.server_state.connections
        while server.model.engine.jobs and time.monotonic() < until:
            time.sleep(0.01)
        assert server.model.engine.jobs == []


def test_pipelined_requests_are_answered_in_order(server: Serving) -> None:
    bodies = [json.dumps({**BODY, "max_tokens": n}).encode() for n in (1, 3, 2)]
    whole = b"".join(map(request, bodies)) + request(b"", "Connection: close", method="GET", path="/v1/models")
    for parts in ([whole], [whole[i : i + 1] for i in range(len(whole))]):
        found = raw(server, *parts)
        texts = [part.split('"')[0] for part in found.decode().split('"content":"')[1:]]
        assert texts == ["H", "Hel", "He"]
        assert found.count(b"HTTP/1.1 200") == 4


def test_half_requests_and_resets(server: Serving) -> None:
    """A client that goes away anywhere in its request leaves nothing behind."""
    whole = request(json.dumps({**BODY, "stream": True}).encode())
    for n in range(0, len(whole) + 1, 9):
        with socket.create_connection((server.host, server.port)) as client:
            client.sendall(whole[:n])
            if n % 2:  # with a reset
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    until = time.monotonic() + 10
    while server.server.n_running and time.monotonic() < until:
        time.sleep(0.01)
    assert server.server.n_running == 0
    assert alive(server)


@pytest.mark.parametrize("name", [
    "messages", "tools", "documents", "bos_token", "eos_token", "add_generation_prompt", "chat_template",
])  # fmt: skip
def test_template_options_that_are_the_servers(server: Serving, name: str) -> None:
    for value in (None, [], "x" * 1000, {"role": "system"}):
        answer = httpx.post(server.url + CHAT, json={**BODY, "chat_template_kwargs": {name: value}})
        assert answer.status_code == 400
        assert name in answer.json()["error"]["message"]
    assert httpx.post(server.url + CHAT, json={**BODY, "chat_template": "{{ 1 }}"}).json()["usage"]["prompt_tokens"] > 9


HOSTILE = "{% for i in range(10**9) %}{% for j in range(10**9) %}x{% endfor %}{% endfor %}"


def test_a_template_that_never_ends_blocks_nobody() -> None:
    """A hostile file's template: its own requests get an error, while others are answered."""
    with serving(scripted(n_ctx=512, template=HOSTILE), scripted(n_ctx=512)) as server:
        with httpx.Client(timeout=60) as client:
            assert client.post(server.url + CHAT, json={**BODY, "model": "m1"}).status_code == 200  # is loaded
            statuses: list[int] = []
            ask = threading.Thread(
                target=lambda: statuses.append(client.post(server.url + CHAT, json={**BODY, "model": "m0"}).status_code)
            )
            ask.start()
            while ask.is_alive():
                start = time.monotonic()
                assert httpx.post(server.url + CHAT, json={**BODY, "model": "m1"}).status_code == 200
                assert time.monotonic() - start < 5
            ask.join()
        assert statuses == [400]


GRAMMARS: dict[str, dict[str, Any]] = {
    "nested": {"grammar": "start: " + "(" * 60_000 + '"a"' + ")" * 60_000},
    "gbnf nested": {"grammar": "root ::= " + "(" * 60_000 + '"a"' + ")" * 60_000},
    "regex": {"structured_outputs": {"regex": "(" * 20_000 + "a" + ")" * 20_000}},
    "regex repeats": {"structured_outputs": {"regex": "((a{1000}){1000}){1000}"}},
    "regex explodes": {"structured_outputs": {"regex": "(a+)+$"}},
    "cycle": {"json_schema": {"$ref": "#"}},
    "cycle of two": {"json_schema": {"$ref": "#/a", "a": {"$ref": "#/b"}, "b": {"$ref": "#/a"}}},
    "items": {"json_schema": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}},
    "length": {"json_schema": {"type": "string", "minLength": 10**9, "maxLength": 10**9}},
    "pattern": {"json_schema": {"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$"}},
    "remote": {"json_schema": {"$ref": "http://127.0.0.1:1/schema.json"}},
    "file": {"json_schema": {"$ref": "file:///etc/passwd"}},
    "no schema": {"json_schema": {"type": "something"}}, "empty": {"json_schema": {}},
}  # fmt: skip


@pytest.mark.parametrize("name", GRAMMARS)
def test_grammars_that_are_bombs(server: Serving, name: str) -> None:
    pytest.importorskip("llguidance")
    answer = httpx.post(server.url + CHAT, json={**BODY, **GRAMMARS[name]}, timeout=60)
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert answer.json()["error"]["message"]
    assert alive(server)


def test_no_path_of_a_client_is_opened(server: Serving, tmp_path: Any) -> None:
    secret = tmp_path / "secret.gguf"
    secret.write_bytes(b"GGUF secret")
    with serving(scripted(n_ctx=512), scripted(n_ctx=512), registry={"folder": tmp_path}) as two:
        for name in (
            str(secret),
            f"../{secret.name}",
            "..%2fsecret",
            "/etc/passwd",
            "hf:evil/model",
            "secret\0",
            "m0/../m1",
        ):
            answer = httpx.post(two.url + CHAT, json={**BODY, "model": name})
            assert answer.status_code == 404, name
            assert "secret" in answer.json()["error"]["message"]  # the one in the folder has a name
        broken = httpx.post(two.url + CHAT, json={**BODY, "model": "secret"})
        assert broken.status_code == 500  # "model cannot be loaded": the scripted loader knows no such file
        for path in ("/page/../../../etc/passwd", "/page/%2e%2e/%2e%2e/app.py", "/page//etc/passwd", "/../app.py"):
            assert b" 404 " in raw(two, request(b"", "Connection: close", method="GET", path=path))[:20]


@pytest.mark.filterwarnings("ignore")
def test_faults_tell_nothing(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the secret of the server")

    monkeypatch.setattr(type(server.model), "chat_prompt", broken)
    answer = httpx.post(server.url + CHAT, json=BODY)
    assert answer.status_code == 500
    assert "secret" not in answer.text
