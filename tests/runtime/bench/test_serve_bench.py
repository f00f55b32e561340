"""gguf-bench serve: the client against scripted answers, the figures, and the command against a scripted server."""

import asyncio
import json
import signal
import socketserver
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.runtime.bench.serving import (
    STATISTICS,
    Question,
    Server,
    arrivals,
    intrude,
    measure,
    outcome,
    questions,
)
from gguf_run.runtime.bench.stream import Record, Target, ask
from gguf_run.runtime.cli.bench import main

TARGET = Target.of("http://host:80")
COMMAND = [sys.executable, "-c", "from gguf_run.runtime.cli.bench import main; main(prog_name='gguf-bench')"]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def sse(*events: Any) -> bytes:
    return b"".join(b"data: %s\n\n" % (e if isinstance(e, bytes) else json.dumps(e).encode()) for e in events)


def text(content: str = "é", **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content}}], **more}


def chunked(body: bytes, size: int) -> bytes:
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%X;x=y\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


USAGE = {"prompt_tokens": 7, "completion_tokens": 4}
EVENTS = (text(""), text(), text(), {"choices": [{"text": "x"}]}, {"choices": [], "usage": USAGE}, b"[DONE]")
BODY = b": a comment\n\n" + sse(*EVENTS)


class Wire:
    """Takes the place of a connection: it brings the pieces of an answer, each at its time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.sent = 0.0, b""
        monkeypatch.setattr(asyncio, "open_connection", self._open)

    async def _open(self, *place: Any, **options: Any) -> tuple[asyncio.StreamReader, "Wire"]:
        self._reader = asyncio.StreamReader()
        return self._reader, self

    def write(self, data: bytes) -> None:
        self.sent = data

    def close(self) -> None:
        self._is_closed = True

    def ask(self, pieces: Sequence[tuple[float, bytes]]) -> Record:
        """Return what the client notes. pieces: seconds and bytes; then the connection ends."""

        async def play() -> Record:
            record, self.now, self._is_closed = Record(), 1.0, False
            asking = asyncio.create_task(ask(TARGET, "/chat/completions", {"a": 1}, record, lambda: self.now))
            await asyncio.sleep(0)
            for at, data in pieces:
                self.now = at
                self._reader.feed_data(data)
                for _ in range(4):
                    await asyncio.sleep(0)
            self._reader.feed_eof()
            await asking
            assert self._is_closed
            return record

        return asyncio.run(play())


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    return Wire(monkeypatch)


# The client.


@pytest.mark.parametrize(
    "answer",
    [
        HEAD + b"\r\n" + BODY,
        HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY + b"what follows is not read",
        HEAD.replace(b"\r\n", b"\r\nX: y\r\n") + b"TRANSFER-encoding: Chunked\r\n\r\n" + chunked(BODY, 50),
        HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunked(BODY.replace(b"\n", b"\r\n"), 1),
    ],
    ids=["to the end", "length", "chunks", "chunks of a byte"],
)
def test_an_answer_is_read_wherever_it_is_cut(wire: Wire, answer: bytes) -> None:
    for cut in range(len(answer)):
        record = wire.ask([(2.0, answer[:cut]), (5.0, answer[cut:])])
        assert (record.error, record.sent, record.n_prompt, record.n_output) == ("", 1.0, 7, 4)
        assert record.parts == sorted(record.parts)
        assert len(record.parts) == 3
        assert {*record.parts} <= {2.0, 5.0}
    whole = wire.ask([(2.0 + i, answer[i : i + 1]) for i in range(len(answer))])
    assert len({*whole.parts}) == 3


def test_a_part_has_the_time_at_which_it_came(wire: Wire) -> None:
    pieces = [(3.0, HEAD + b"\r\n"), (4.0, sse(text(""))), (5.0, sse(text())), (5.5, sse(text(), text())[:-1])]
    record = wire.ask(
        [*pieces, (7.0, b"\n"), (9.0, sse({"choices": [{"delta": {}, "finish_reason": "stop"}]}, b"[DONE]"))]
    )
    assert record.parts == [5.0, 5.5, 5.5]
    assert wire.sent.startswith(b"POST /v1/chat/completions HTTP/1.1\r\nHost: host:80\r\n")
    assert wire.sent.endswith(b'Content-Length: 8\r\n\r\n{"a": 1}')


@pytest.mark.parametrize("name", ["content", "reasoning_content", "reasoning", "tool_calls"])
def test_what_counts_as_text(wire: Wire, name: str) -> None:
    event = {"choices": [{"delta": {"role": "assistant", name: "x"}}]}
    nothing = {"choices": [{"delta": {"role": "assistant", name: None}}]}
    record = wire.ask([(2.0, HEAD + b"\r\n"), (3.0, sse(nothing)), (4.0, sse(event, b"[DONE]"))])
    assert (record.error, record.parts) == ("", [4.0])


def refusal(status: str, body: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n" % (status.encode(), len(body)) + body


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", "the connection ended before the answer did"),
        (b"HTTP/1.1 200", "the connection ended before the answer did"),
        (HEAD + b"Content-Length: 999\r\n\r\n" + BODY[:80], "the connection ended before the answer did"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(BODY[:80], 9)[:-5], "the connection ended before"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "invalid literal"),
        (HEAD + b"\r\n" + sse(*EVENTS[:-1]), "the answer ended without [DONE]"),
        (HEAD + b"\r\n" + sse(text(""), b"[DONE]"), "the answer has no text"),
        (HEAD + b"\r\n" + sse(text(), {"error": {"message": "no memory"}}), "no memory"),
        (HEAD + b"\r\n" + sse(b"{"), "Expecting property name"),
        (HEAD + b"\r\n" + sse(b"[1]"), "the answer is not of OpenAI's form"),
        (HEAD + b"\r\n" + sse({"choices": [], "usage": {"prompt_tokens": 1}}), "the answer is not of OpenAI's form"),
        (b"SSH-2.0 OpenSSH\r\n\r\n", "the server speaks ssh-2.0, not HTTP/1.1"),
        (refusal("429 Busy", b'{"error": {"message": "queue is full"}}'), "HTTP 429: queue is full"),
        (refusal("404 No", b'{"error": "no model x"}'), "HTTP 404: no model x"),
        (refusal("502 Bad", b"<html>"), "HTTP 502: <html>"),
        (refusal("500 Bad", b""), "HTTP 500: "),
    ],
)
def test_why_there_is_no_answer(wire: Wire, answer: bytes, error: str) -> None:
    for cut in range(0, len(answer) + 1, 7):
        assert wire.ask([(2.0, answer[:cut]), (3.0, answer[cut:])]).error.startswith(error)


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("localhost:8080", ("localhost", 8080, False, "/v1")),
        ("http://[::1]:1/", ("::1", 1, False, "/v1")),
        ("https://a.b/openai/v1/", ("a.b", 443, True, "/openai/v1")),
        ("http://a", ("a", 80, False, "/v1")),
    ],
)
def test_addresses(url: str, place: tuple[Any, ...]) -> None:
    target = Target.of(url, "k")
    assert (target.host, target.port, target.is_tls, target.path) == place
    assert target.request("/models").startswith(f"GET {place[3]}/models HTTP/1.1\r\n".encode())
    assert b"\r\nAuthorization: Bearer k\r\n" in target.request("/models")


@pytest.mark.parametrize("url", ["", "ftp://a", "http://a:x", "http://a:99999", "http://", "http://a/b c", "http://é"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(OptionError, match="URL is"):
        Target.of(url)
    with pytest.raises(OptionError, match="--api-key"):
        Target.of("a", "k\r\nX: y")


# Figures.


@pytest.mark.parametrize(
    ("parts", "n_output", "figures"),
    [
        ([1.5, 1.7, 2.0, 2.5], 5, ([500], [250], [200, 300, 500], [1500])),
        ([1.5, 2.5], 0, ([500], [1000], [1000], [1500])),
        ([1.5, 1.5], 9, ([500], [0], [0], [500])),
        ([1.5], 1, ([500], [], [], [500])),
    ],
)
def test_figures_of_an_answer(parts: list[float], n_output: int, figures: tuple[list[float], ...]) -> None:
    found = Record(1.0, parts, 3, n_output).figures()
    assert [*found] == ["ttft", "tpot", "itl", "e2el"]
    for values, expected in zip(found.values(), figures, strict=True):
        assert values == pytest.approx(expected)


def test_figures_of_all_answers() -> None:
    records = [
        Record(0.0, [1.0, 2.0, 3.0], 10, 3),
        Record(1.0, [1.5, 2.0], 20, 2),
        Record(1.0, [9.0], 30, 1),
        Record(2.0, [2.5], 5, 1, "broken"),
        Record(2.0, [], error="also broken"),
    ]
    found = outcome(records, 10.0, {"ttft": 1000, "tpot": 900})
    assert found.figures == {
        "ttft": [1000, 500, 8000],
        "tpot": [1000, 500],
        "itl": [1000] * 2 + [500],
        "e2el": [3000, 1000, 8000],
    }
    assert found.error == "broken"
    assert found.totals == pytest.approx(
        {
            "duration": 10, "completed": 3, "failed": 2, "total_input_tokens": 60, "total_output_tokens": 6,
            "request_throughput": 0.3, "output_throughput": 0.6, "total_token_throughput": 6.6, "tokens_per_event": 1.0,
            "request_goodput": 0.1,
        }
    )  # fmt: skip
    assert outcome(records, 10.0, {"ttft": 1000, "tpot": 1000}).totals["request_goodput"] == pytest.approx(0.2)
    assert "request_goodput" not in outcome(records, 10.0, {}).totals
    with pytest.raises(GgufRunError, match="all answers failed, the first by: broken"):
        outcome(records[3:], 10.0, {})


def test_statistics() -> None:
    values = [float(value) for value in range(101)]
    assert {name: compute(values[::-1]) for name, compute in STATISTICS.items()} == {
        "mean": 50, "median": 50, "p95": 95, "p99": 99, "max": 100,
    }  # fmt: skip


# What is asked, and when.


def lengths(asked: Sequence[Question]) -> list[tuple[int, int, int]]:
    return [(len(one.shared.split()), len(one.own.split()), one.n_output) for one in asked]


def test_mixed_lengths() -> None:
    asked = questions("mixed", 2000, 2000, 400, 0)
    prompts, outputs = (np.array([row[i] for row in lengths(asked)]) for i in (1, 2))
    for drawn, low, high in ((prompts, 30, 2000), (outputs, 20, 400)):
        assert (drawn.min(), drawn.max()) == (low, high)
        assert np.mean((drawn == low) | (drawn == high)) == pytest.approx(0.05, abs=0.02)
        assert np.median(drawn) == pytest.approx((low * high) ** 0.5, rel=0.1)
    assert {row[1:] for row in lengths(questions("mixed", 50, 3, 1, 0))} == {(3, 1)}


@pytest.mark.parametrize("kind", ["mixed", "fixed", "shared"])
def test_a_seed_repeats_all_but_the_first_words(kind: str) -> None:
    first, again, other = (questions(kind, 20, 200, 40, seed) for seed in (1, 1, 2))
    assert lengths(first) == lengths(again)
    assert questions(kind, 20, 200, 40, 1, 5) == questions(kind, 20, 200, 40, 1, 5)
    heads = [[(one.shared or one.own).split()[:8] for one in asked] for asked in (first, again, other)]
    tails = [[one.own.split()[8:] for one in asked] for asked in (first, again, other)]
    assert heads[0] != heads[1]
    assert tails[0] == tails[1] != tails[2]
    assert len({one.shared for one in first}) == 1
    assert len({one.own for one in first}) == 20
    assert {*lengths(questions("fixed", 3, 200, 40, 1))} == {(0, 200, 40)}
    assert {*lengths(questions("shared", 3, 200, 40, 1))} == {(200, 32, 40)}


def test_arrivals() -> None:
    times = arrivals(4.0, 20_000, 3)
    gaps = np.diff([0.0, *times])
    assert times == arrivals(4.0, 20_000, 3) != arrivals(4.0, 20_000, 4)
    assert times[-1] == pytest.approx(5000)
    assert gaps.min() > 0
    for quantile in (0.1, 0.5, 0.9, 0.99):  # of the exponential distribution
        assert np.quantile(gaps, quantile) == pytest.approx(-np.log(1 - quantile) / 4, rel=0.05)


class Scripted(Server):
    """Answers by a function, without a connection."""

    def __init__(self, answer: Callable[[Question, Record], Coroutine[Any, Any, None]]) -> None:
        super().__init__(TARGET, "m")
        self.__dict__["ask"] = answer


@pytest.mark.parametrize("n_clients", [1, 3, 40])
def test_closed_loop(n_clients: int) -> None:
    running, most, seen, shown = Counter[str](), 0, [], []

    async def answer(question: Question, record: Record) -> None:
        nonlocal most
        running["now"] += 1
        most = max(most, running["now"])
        seen.append(question)
        for _ in range(question.n_output):
            await asyncio.sleep(0)
        running["now"] -= 1
        record.parts = [1.0]

    asked = questions("mixed", 20, 10, 30, 0)
    found = asyncio.run(measure(Scripted(answer), asked, n_clients=n_clients, show=lambda *done: shown.append(done)))
    assert seen == asked
    assert most == min(n_clients, 20)
    assert shown == [(i + 1, 20) for i in range(20)]
    assert found.totals["completed"] == 20


def test_poisson_arrivals_wait_for_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    sleep, slept, all_came = asyncio.sleep, [], asyncio.Event()

    async def no_sleep(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    async def answer(question: Question, record: Record) -> None:
        running.append(question)
        if len(running) == 5:
            all_came.set()
        await all_came.wait()
        record.parts = [1.0]

    running: list[Question] = []
    monkeypatch.setattr(asyncio, "sleep", no_sleep)
    times = arrivals(2.0, 5, 0)
    asyncio.run(measure(Scripted(answer), questions("fixed", 5, 4, 2, 0), times))
    assert slept == times


def test_an_intruder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaps are sorted by the time at which the long prompt is on its way; the streams end when it has come."""
    came, ended = asyncio.Event(), []

    async def answer(question: Question, record: Record) -> None:
        if question.own == "long":
            record.sent, record.parts = 100.0, [103.0, 104.0]
            came.set()
            return
        record.parts += [70.0 + i for i in range(30)]  # to 99
        await came.wait()
        record.parts += [100.5, 102.75, 103.25, 110.0, 111.0]
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(question)

    streams = [Question("", f"stream {i}", 99) for i in range(2)]
    found = asyncio.run(intrude(Scripted(answer), Question("", "long", 8), streams))
    assert found == {"ttft": [3000], "itl_before": [1000] * 58, "itl_during": [1500, 2250, 500] * 2}
    assert ended == streams


@pytest.mark.parametrize(
    ("stream_error", "long_error", "expected"),
    [("x", "", "x"), ("", "y", "y"), ("", "", "the streams ended before the long prompt came")],
)
def test_an_intruder_without_figures(stream_error: str, long_error: str, expected: str) -> None:
    async def answer(question: Question, record: Record) -> None:
        is_long = question.own == "long"
        record.sent, record.parts, record.error = 5.0, [6.0], long_error
        if not is_long:
            record.sent, record.parts, record.error = 0.0, [1.0, 2.0], stream_error

    with pytest.raises(GgufRunError, match=expected):
        asyncio.run(intrude(Scripted(answer), Question("", "long", 8), [Question("", "stream", 9)]))


# The command.


class Handler(socketserver.StreamRequestHandler):
    """A scripted server: /v1/models, and answers of as many tokens as are asked for."""

    server: "Backend"

    def handle(self) -> None:
        head = b"".join(iter(self.rfile.readline, b"\r\n"))
        if head.startswith(b"GET /v1/models "):
            self.wfile.write(refusal("200 OK", b'{"data": [{"id": "tiny/model"}]}'))
            return
        length = next(int(line.split(b":")[1]) for line in head.splitlines() if b"Content-Length" in line)
        body = json.loads(self.rfile.read(length))
        self.server.bodies.append((head.split()[1].decode(), body))
        n_before = len(self.server.bodies)
        if n_before > self.server.n_answers:
            self.server.hangs.wait()
        elif n_before % 5 == 0:
            self.wfile.write(refusal("429 Busy", b'{"error": {"message": "queue is full"}}'))
        else:
            n = body["max_tokens"]
            usage = {"prompt_tokens": 11, "completion_tokens": 2 * n}
            events = sse(*[text()] * n, {"choices": [], "usage": usage}, b"[DONE]")
            self.wfile.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(events, 60))


class Backend(socketserver.ThreadingTCPServer):
    """Answers n_answers requests, each fifth by an error; those after it wait."""

    daemon_threads, block_on_close, n_answers = True, False, 1 << 30

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.hangs = threading.Event()


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.hangs.set()
        server.shutdown()
        thread.join()


def bench(backend: Backend, *arguments: str) -> Any:
    host, port = backend.server_address[:2]
    return CliRunner().invoke(main, ["serve", f"{host}:{port}", *arguments])


def test_the_command(backend: Backend, tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.svg")]
    done = bench(backend, "-c", "1-3", "-w", "shared", "-n", "6", "-r", "9", "--slo", "ttft:60000,tpot:60000", *files)
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "tiny/model: a system prompt of 1000 tokens that all share, answers of 6"
    assert [line for line in lines if "client" in line and "answers in" in line][1].startswith(
        "2 clients: 7 answers in"
    )
    assert lines.count("failed: 2, the first by: HTTP 429: queue is full") == 3
    assert [line.split()[0] for line in lines[-4:]] == ["TTFT", "TPOT", "ITL", "E2E"]
    results = json.loads((tmp_path / "a.json").read_text())["results"]
    assert [result["load"] for result in results] == ["1 client", "2 clients", "3 clients"]
    for result in results:
        assert (result["completed"], result["failed"], result["tokens_per_event"]) == (7, 2, 2.0)
        assert (result["total_input_tokens"], result["total_output_tokens"]) == (77, 84)
        assert result["request_goodput"] == result["request_throughput"] == pytest.approx(7 / result["duration"])
        assert result["mean_ttft_ms"] <= result["max_ttft_ms"] <= result["max_e2el_ms"]
    elements = [element.tag.partition("}")[2] for element in ElementTree.parse(tmp_path / "a.svg").iter()]
    assert elements.count("polyline") == 3 + 4 * 3
    path, body = backend.bodies[-1]
    assert path == "/v1/chat/completions"
    assert [message["role"] for message in body.pop("messages")] == ["system", "user"]
    assert body == {
        "model": "tiny/model", "max_tokens": 6, "stream": True, "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }  # fmt: skip


def test_completions_at_a_rate(backend: Backend) -> None:
    options = ("--rate", "500,1000", "--api", "completions", "--model", "other", "--no-ignore-eos", "-w", "fixed")
    done = bench(backend, *options, "-p", "20", "-n", "3", "-r", "4")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "500 requests/s: " in done.stdout
    assert "good" not in done.stdout
    path, body = backend.bodies[-1]
    assert (path, body["model"], len(body["prompt"].split()), "ignore_eos" in body) == (
        "/v1/completions",
        "other",
        20,
        False,
    )
    assert len(backend.bodies) == 2 * (1 + 4)


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["-c", "0"], 2, "--clients '0': allowed are 1 to"),
        (["--rate", "1,x"], 2, "--rate 1,x: must be numbers above 0"),
        (["--rate", "nan"], 2, "--rate nan: must be numbers above 0"),
        (["--rate", "1", "-c", "2"], 2, "--rate sets when requests come: leave out --clients"),
        (["--rate", "1", "-w", "intruder"], 2, "--rate sets when requests come"),
        (["--slo", "ttft"], 2, "--slo 'ttft': must be a figure and milliseconds"),
        (["--slo", "itl:3"], 2, "--slo 'itl:3': must be"),
        (["--json", "/nowhere/a.json"], 1, "--json /nowhere/a.json: cannot be written"),
        (["-w", "intruder", "-n", "2", "-r", "1", "-c", "1"], 1, "the streams ended before the long prompt came"),
    ],
)
def test_errors_are_one_line(backend: Backend, arguments: list[str], code: int, error: str) -> None:
    done = bench(backend, *arguments)
    assert (done.exit_code, len(done.stderr.splitlines())) == (code, 1), done.stderr
    assert done.stderr.startswith(f"error: {error}")


def test_no_server_and_no_answer(backend: Backend) -> None:
    backend.n_answers = 0
    backend.hangs.set()
    done = bench(backend, "-r", "3")
    assert (done.exit_code, done.stderr) == (1, "error: the connection ended before the answer did\n")
    done = CliRunner().invoke(main, ["serve", "127.0.0.1:1"])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: no connection to 127.0.0.1:1: ")


def test_ctrl_c_keeps_what_is_measured(backend: Backend, tmp_path: Path) -> None:
    backend.n_answers = 4
    url = "http://{}:{}".format(*backend.server_address[:2])
    arguments = ["serve", url, "-c", "2,3", "-r", "3", "-w", "fixed", "--json", str(tmp_path / "a.json")]
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert any("E2E" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        assert (process.wait(), process.stderr.read()) == (130, "\n")
    assert [result["load"] for result in json.loads((tmp_path / "a.json").read_text())["results"]] == ["2 clients"]
