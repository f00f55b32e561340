"""Random requests with faults of clients and of steps: each answer is right or an error, and nothing is left behind.

`python tests/runtime/serve/test_faults.py 10000` runs many, and prints the memory before and after.
"""

import json
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[2] / "helpers"))
pytest.importorskip("httptools")
pytest.importorskip("starlette")
from served import Serving, scripted, serving

CHAT = "/v1/chat/completions"


def answer_to(prompt: str) -> str:
    """The only right answer to a prompt that ends with "number length": letters that no other number has."""
    number, length = map(int, prompt.rstrip().removesuffix("<|im_end|>").split()[-2:])
    return "".join(random.Random(number).choices("abcdefghij", k=length))


def request(path: str, body: Any) -> bytes:
    text = json.dumps(body).encode()
    return b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (
        path.encode(), len(text), text,
    )  # fmt: skip


def exchange(server: Serving, rng: random.Random, sent: bytes, fault: str) -> bytes | None:
    """Send a request as `fault` says; return all that came back, None if nobody waited for it."""
    with socket.create_connection((server.host, server.port), timeout=60) as client:
        if fault == "half":
            client.sendall(sent[: rng.randrange(len(sent))])
            return None
        if fault == "slow":
            for i in range(0, len(sent), 97):
                client.sendall(sent[i : i + 97])
                time.sleep(0.001)
        else:
            client.sendall(sent)
        if fault in ("gone", "reset"):
            client.settimeout(rng.random() / 10)
            if fault == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with suppress(TimeoutError):
                client.recv(1 << rng.randrange(12))
            return None
        found = b""
        while new := client.recv(1 << 16):
            found += new
            if fault == "late":
                time.sleep(0.002)
    return found


def texts_of(found: bytes, n: int, *, is_stream: bool) -> list[tuple[str, str]] | None:
    """Return the texts and ends of n answers; None for an error, which must have the form of one."""
    head, _, body = found.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    if status != 200:
        assert json.loads(body)["error"]["message"]
        assert status in (400, 429, 500, 503), found
        return None
    if not is_stream:
        choices = json.loads(body)["choices"]
        return [
            (choice.get("text") or choice["message"]["content"] or "", choice["finish_reason"]) for choice in choices
        ]
    texts, ends = [""] * n, [""] * n
    lines = [line for line in body.splitlines() if line.startswith(b"data: ")]
    for line in lines:
        if line == b"data: [DONE]":
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            assert lines[-1] == line
            return None
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice.get("text") or choice.get("delta", {}).get("content") or ""
            ends[choice["index"]] = choice["finish_reason"] or ends[choice["index"]]
    assert lines[-1] == b"data: [DONE]"
    return [*zip(texts, ends, strict=True)]


FAULTS = ["none"] * 8 + ["half", "slow", "gone", "reset", "late", "garbage", "invalid", "step"]


def one(server: Serving, rng: random.Random, number: int, seen: "Counter[str]") -> None:
    """Make a random request, and check what comes back."""
    fault, n, is_stream = rng.choice(FAULTS), rng.choice((1, 1, 1, 2, 3)), rng.random() < 0.6
    length, most = rng.randrange(1, 120), rng.choice((None, 1, 30, 500))
    content = "x" * rng.randrange(0, 300) + f" {number} {length}"
    body: dict[str, Any] = {"messages": [{"role": "user", "content": content}], "n": n, "stream": is_stream}
    if most is not None:
        body["max_tokens"] = most
    if fault == "garbage":
        exchange(server, rng, rng.randbytes(rng.randrange(1, 3000)) + b"\r\n\r\n\r\n", "reset")
    elif fault == "invalid":
        broken = rng.choice(
            ({"n": 0}, {"messages": 5}, {"max_tokens": -1}, {"stop": [""]}, {"tool_choice": "required"})
        )
        found = exchange(server, rng, request(CHAT, body | broken), "none")
        assert found is not None
        assert found.split()[1] == b"400"
    else:
        if fault == "step":
            server.model.decoder.fails.append(RuntimeError("a step fails"))
        found = exchange(server, rng, request(CHAT, body), fault)
        if found is not None:
            texts = texts_of(found, n, is_stream=is_stream)
            right = answer_to(content)
            expected = (right[:most], "length") if most is not None and most <= length else (right, "stop")
            assert texts is None or texts == [expected] * n, (content, texts)
            fault += " error" * (texts is None)
    seen[fault] += 1


def run(server: Serving, n: int, n_threads: int = 8) -> "Counter[str]":
    """Make n random requests. Return the numbers of kinds."""
    seen: Counter[str] = Counter()
    failed: list[BaseException] = []

    def client(i: int) -> None:
        rng = random.Random(i)
        try:
            for number in range(i, n, n_threads):
                one(server, rng, number, seen)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    until = time.monotonic() + 30
    connections = server.uvicorn.server_state.connections
    while (server.model.engine.jobs or server.server.n_running or connections) and time.monotonic() < until:
        time.sleep(0.01)
    served = next(iter(server.server.registry.loaded.values()))
    assert (server.model.engine.jobs, server.server.n_running, served.n_users) == ([], 0, 0)
    assert not connections
    return seen


def test_random_requests_with_faults() -> None:
    with serving(scripted(answer_to, n_ctx=1024, n_seq=4, n_cells=2048)) as server:
        seen = run(server, 300)
        assert seen["none"] > 80, seen
        server.model.decoder.fails.clear()
        assert run(server, 1)


def _memory() -> float:
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    import logging

    logging.disable()
    with serving(scripted(answer_to, n_ctx=1024, n_seq=4, n_cells=2048)) as server:
        run(server, 500)
        before, start, n = _memory(), time.monotonic(), int(sys.argv[1])
        found = run(server, n)
        print(f"{n} requests in {time.monotonic() - start:.0f} s, {before:.1f} -> {_memory():.1f} MiB, {dict(found)}")
