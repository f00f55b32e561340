"""The command as a process, logs, metrics, several models."""

import json
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("httptools")
pytest.importorskip("starlette")
from adapter_files import random_pairs, write_adapter  # noqa: E402
from click.testing import CliRunner  # noqa: E402
from served import Serving, scripted, serving  # noqa: E402
from tinymodel import AWKWARD_LLAMA, write_tiny  # noqa: E402

from gguf_run.formats.errors import FormatError  # noqa: E402
from gguf_run.runtime.cli.serve import main, seconds_of  # noqa: E402
from gguf_run.runtime.model import Model  # noqa: E402
from gguf_run.runtime.serve.registry import gguf_files, name_of  # noqa: E402
from gguf_run.runtime.serve.server import Access  # noqa: E402

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Say hello"}], "max_tokens": 3}


def ask(server: Serving, model: str = "m0", **more: Any) -> Any:
    return httpx.post(server.url + CHAT, json={**BODY, "model": model, **more}, timeout=60)


def wait(condition: Callable[[], object], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_line_for_each_request() -> None:
    lines: list[str] = []
    access = Access(keys=("the key",), log=lines.append)
    with serving(scripted({"secret": "hidden answer"}, n_ctx=512), access=access) as server:
        body = {**BODY, "messages": [{"role": "user", "content": "secret question"}], "max_tokens": 5}
        headers = {"x-api-key": "the key", "x-request-id": "mine-1"}
        answer = httpx.post(server.url + CHAT + "?key=abc", json=body, headers=headers)
        assert answer.headers["x-request-id"] == "mine-1"
        with httpx.stream("POST", server.url + CHAT, json={**body, "stream": True}, headers=headers) as stream:
            stream.read()
        httpx.post(server.url + CHAT, json=body, headers={"x-request-id": "a b"})
        wait(lambda: len(lines) == 3)
    whole, streamed, refused = map(json.loads, lines)
    for line in (whole, streamed):
        assert (line["method"], line["path"], line["status"], line["model"]) == ("POST", CHAT, 200, "m0")
        assert (line["id"], line["client"], line["n_decoded"]) == ("mine-1", "127.0.0.1", 5)
        assert 0 < line["ttft_ms"] <= line["ms"]
    assert streamed["n_cached"] > 0
    assert refused["status"] == 401
    assert refused["id"] != "a b"
    assert "n_prompt" not in refused
    assert not re.search("secret|hidden|the key|abc", "".join(lines))


def test_the_log_tells_of_a_schema_that_is_refused() -> None:
    lines: list[str] = []
    function = {"name": "f", "parameters": {"properties": {"a": {"type": "string", "pattern": "(?=x)y"}}}}
    with serving(scripted(n_ctx=512), access=Access(log=lines.append)) as server:
        body = {**BODY, "tools": [{"type": "function", "function": function}]}
        assert httpx.post(server.url + CHAT, json=body).status_code == 200
        wait(lambda: lines)
    assert "look-around" in json.loads(lines[0])["note"]


def samples(text: str) -> dict[str, float]:
    """Parse Prometheus' text format. Each family is declared once, before its samples."""
    found: dict[str, float] = {}
    family = ""
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, family, kind = line.split()
            assert kind in ("gauge", "counter", "histogram")
            assert not any(name.startswith(family + "{") for name in found)
        else:
            match = re.fullmatch(r'([a-z_]+:[a-z0-9_]+)(\{(?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)+\}) (\S+)', line)
            assert match, line
            assert match[1].startswith(family)
            assert match[1] + match[2] not in found
            found[match[1] + match[2]] = float(match[3])
    return found


def test_metrics() -> None:
    with serving(scripted(n_ctx=512), scripted(n_ctx=512), has_metrics=True) as server:
        for _ in range(3):
            ask(server, n=2)
        ask(server, "m1", max_tokens=20)
        assert ask(server, 'evil"\n').status_code == 404
        text = httpx.get(server.url + "/metrics").text
    found = samples(text)
    assert "evil" not in text

    def get(name: str, model: str = "m0", more: str = "") -> float:
        return found[f'{name}{{model_name="{model}"{more}}}']

    n_prompt = get("vllm:prompt_tokens_total", "m1")
    assert get("vllm:prompt_tokens_total") == 6 * n_prompt == get("vllm:prefix_cache_queries_total")
    assert 0 < get("vllm:prefix_cache_hits_total") < get("vllm:prompt_tokens_total")
    assert get("vllm:generation_tokens_total") == 18 == get("llamacpp:tokens_predicted_total")
    assert get("vllm:request_success_total", "m0", ',finished_reason="length"') == 6
    assert get("vllm:request_success_total", "m1", ',finished_reason="stop"') == 1
    for name in ("time_to_first_token", "e2e_request_latency"):
        name = f"vllm:{name}_seconds"
        assert get(f"{name}_count") == 6 == get(f"{name}_bucket", "m0", ',le="+Inf"')
        assert get(f"{name}_sum") > 0
        buckets = [x for key, x in found.items() if key.startswith(f'{name}_bucket{{model_name="m0"')]
        assert buckets == sorted(buckets)
    assert get("vllm:inter_token_latency_seconds_count", "m1") > 0
    for name in ("num_requests_running", "num_requests_waiting"):
        assert get(f"vllm:{name}") == 0
    assert get("vllm:cache_config_info", "m0", f',block_size="64",num_gpu_blocks="{4 * 512 // 64}"') == 1
    with serving(scripted(n_ctx=512)) as server:
        assert httpx.get(server.url + "/metrics").status_code == 404


def test_gauges_while_answers_run() -> None:
    with serving(scripted({"": "x" * 400}, delay_s=0.01, n_ctx=512, n_seq=2), has_metrics=True) as server:
        clients = [threading.Thread(target=ask, args=(server,), kwargs={"max_tokens": 100}) for _ in range(4)]
        for client in clients:
            client.start()
        wait(lambda: len(server.model.engine.jobs) == 4)
        wait(lambda: sum(job.row >= 0 for job in server.model.engine.jobs) == 2)
        found = samples(httpx.get(server.url + "/metrics").text)
        assert found['vllm:num_requests_running{model_name="m0"}'] == 2
        assert found['llamacpp:requests_deferred{model_name="m0"}'] == 2
        assert 0 < found['vllm:kv_cache_usage_perc{model_name="m0"}'] < 1
        for client in clients:
            client.join()


def test_a_full_queue() -> None:
    model = scripted({"": "x" * 400}, delay_s=0.01, n_ctx=512, n_seq=1)
    model.engine.max_queue = 1
    with serving(model) as server:
        answers: list[Any] = []
        clients = [threading.Thread(target=lambda: answers.append(ask(server, max_tokens=50))) for _ in range(6)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert len(refused) + sum(answer.status_code == 200 for answer in answers) == 6
    assert all(int(answer.headers["Retry-After"]) > 0 for answer in refused)
    assert refused[0].json()["error"]["code"] == "queue_full"


def test_models_come_and_go() -> None:
    """At most one is loaded; the other goes when it is idle, and comes back when it is asked for."""
    made: list[str] = []

    def maker(name: str) -> Callable[[], Any]:
        def make() -> Any:
            made.append(name)
            return scripted({"": name * 100}, delay_s=0.005, n_ctx=512)

        return make

    with serving(maker("a"), maker("b"), registry={"max_models": 1}) as server:
        found = [ask(server, model).json()["choices"][0]["message"]["content"] for model in ("m0", "m1", "m1", "m0")]
        assert found == ["aaa", "bbb", "bbb", "aaa"]
        assert made == ["a", "b", "a"]
        assert [*server.server.registry.loaded] == ["m0"]
        # Never under an answer: the other model waits for its end.
        long: list[Any] = []
        client = threading.Thread(target=lambda: long.append(ask(server, max_tokens=60)))
        client.start()
        wait(lambda: server.model.engine.jobs)
        assert ask(server, "m1").json()["choices"][0]["message"]["content"] == "bbb"
        client.join()
        assert long[0].json()["choices"][0]["message"]["content"] == "a" * 60
    with serving(maker("a"), registry={"keep_alive": 0.2}) as server:
        made.clear()
        assert ask(server, max_tokens=99).json()["usage"]["completion_tokens"] == 99  # longer than it is kept
        wait(lambda: not server.server.registry.loaded)
        assert httpx.get(server.url + "/v1/models").json()["data"][0]["id"] == "m0"
        assert ask(server).status_code == 200
        assert {*made} == {"a"}


def test_all_models_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gguf_run.runtime.serve.registry._WAIT_S", 0.1)
    one = scripted({"": "x" * 400}, delay_s=0.01, n_ctx=512)
    with serving(one, scripted(n_ctx=512), registry={"max_models": 1}) as server:
        client = threading.Thread(target=ask, args=(server,), kwargs={"max_tokens": 100})
        client.start()
        wait(lambda: one.engine.jobs)
        answer = ask(server, "m1")
        assert answer.status_code == 503
        assert "Retry-After" in answer.headers
        client.join()


def test_a_model_that_cannot_be_loaded_leaves_the_others() -> None:
    def broken() -> Any:
        raise FormatError("broken.gguf: is damaged")

    with serving(scripted(n_ctx=512), broken) as server:
        for _ in range(2):
            answer = ask(server, "m1")
            assert answer.status_code == 500
            assert "broken.gguf: is damaged" in answer.json()["error"]["message"]
            assert ask(server).status_code == 200


def test_names(tmp_path: Path) -> None:
    names = ("b.gguf", "A.GGUF", "big-00001-of-00002.gguf", "big-00002-of-00002.gguf", "c.txt", "v1.5-Q4.gguf")
    for name in names:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "below.gguf").mkdir()
    assert [*gguf_files(tmp_path)] == ["A", "b", "big", "v1.5-Q4"]
    assert name_of("hf:owner/Llama-3.2-1B-GGUF:Q4_K_M") == "Llama-3.2-1B-GGUF:Q4_K_M"
    assert name_of("C:\\models\\a.gguf") == "a"
    for text, seconds in (("0", 0), ("300", 300), ("5m", 300), ("1.5h", 5400), ("-1", -1)):
        assert seconds_of(text) == seconds


@pytest.mark.parametrize(("arguments", "code", "text"), [
    ([], 2, "Nothing to serve"), (["m.gguf", "--keep-alive", "soon"], 2, "--keep-alive soon"),
    (["m.gguf", "--port", "70000"], 2, "70000"), (["--models-dir", "nowhere"], 2, "is no folder"),
    (["m.gguf", "--alias", "a", "--alias", "b"], 2, "--alias comes 2 times"),
    (["a.gguf", "b.gguf", "--lora", "x"], 2, "--lora goes with one model"),
    (["m.gguf", "--tls-key", "k"], 2, "--tls-key needs --tls-cert"), (["m.gguf", "--api-key", " "], 2, "is empty"),
    (["m.gguf", "--api-key-file", "none"], 1, "none"), (["a/m.gguf", "b/m.gguf", "--port", "0"], 2, "--alias"),
    (["m.gguf", "--host", "256.1.1.1"], 1, "cannot listen at 256.1.1.1"),
    (["m.gguf", "--port", "0", "--tls-cert", "none"], 1, "--tls-cert none"),
    (["nowhere.gguf", "--port", "0"], 1, "nowhere.gguf"),
])  # fmt: skip
def test_what_the_command_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int,
                                  text: str) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == code, done.output
    assert text in done.output


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        done = CliRunner().invoke(main, ["m.gguf", "--port", str(held.getsockname()[1])])
    assert done.exit_code == 1
    assert "--port N chooses another" in done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "tiny.gguf"
    write_tiny(path, AWKWARD_LLAMA)
    return path


@contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command; yield its process and the URL that it prints first."""
    code = "from gguf_run.runtime.cli.start import serve; serve()"
    command = [sys.executable, "-c", code, "--port", "0", "--device", "cpu", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout
            yield running, running.stdout.readline().strip()
        finally:
            running.kill()


def test_sigterm_ends_running_answers_and_refuses_new_ones(model: Path) -> None:
    with process(str(model), "--parallel", "2") as (running, url):
        content = {"prompt": "the", "max_tokens": 100, "ignore_eos": True, "stream": True, "n": 32}
        with httpx.stream("POST", f"{url}/v1/completions", json=content, timeout=300) as stream:
            lines = stream.iter_lines()
            next(lines)
            running.send_signal(signal.SIGTERM)
            wait(lambda: httpx.get(f"{url}/v1/models").status_code == 503)
            rest = [*lines]
        assert "data: [DONE]" in rest
        assert running.wait(60) == 0
        assert running.stderr
        logged = [json.loads(line) for line in running.stderr if line.startswith("{")]
        assert {line["status"] for line in logged} >= {200, 503}
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)


def test_a_second_signal_ends_at_once(model: Path) -> None:
    """The first one waits for a request whose body has not come yet."""
    with process(str(model)) as (running, url):
        httpx.get(f"{url}/v1/models", timeout=300)
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=60) as client:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
            client.sendall(head + b"Expect: 100-continue\r\n\r\n")
            assert client.recv(99).startswith(b"HTTP/1.1 100")  # it is being answered
            running.send_signal(signal.SIGINT)
            time.sleep(0.5)
            assert running.poll() is None
            running.send_signal(signal.SIGINT)
            assert running.wait(20) == 130


def test_adapters_are_models(model: Path, tmp_path: Path) -> None:
    """The base is without adapters; each adapter has a name of its own; they run together."""
    paths = [
        write_adapter(tmp_path / f"{name}.gguf", random_pairs(AWKWARD_LLAMA, {"attn_q": 4, "ffn_down": 4}, seed))
        for seed, name in enumerate(("one", "two"))
    ]
    loras = [word for path in paths for word in ("--lora", str(path))]
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
    expected = []
    for given in ([], paths[:1], paths[1:]):
        with Model.load(model, device="cpu", lora=given) as loaded:
            expected.append(loaded.complete("the", **options).text)
    assert len({*expected}) == 3
    with process(str(model), "--quiet", *loras) as (_, url):
        names = [entry["id"] for entry in httpx.get(f"{url}/v1/models", timeout=300).json()["data"]]
        assert names == ["tiny", "tiny:one", "tiny:two"]
        found: dict[str, str] = {}

        def ask(name: str) -> None:
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": "the", "model": name, **options}, timeout=300)
            found[name] = answer.json()["choices"][0]["text"]

        clients = [threading.Thread(target=ask, args=(name,)) for name in names * 2]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    assert [found[name] for name in names] == expected


def test_tls_keys_and_a_warning(model: Path, tmp_path: Path) -> None:
    cert, keys = tmp_path / "cert.pem", tmp_path / "keys.txt"
    keys.write_text("# of the team\nfirst\n\nsecond\n")
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*make.split(), "-keyout", cert.with_suffix(".key"), "-out", cert], capture_output=True, check=True)
    tls = "--tls-cert", str(cert), "--tls-key", str(cert.with_suffix(".key"))
    with process(str(model), "--alias", "mine", "--api-key-file", str(keys), "--metrics", "--quiet", *tls) as (_, url):
        assert url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=str(cert))
        with httpx.Client(base_url=url, verify=context, timeout=300) as client:
            assert client.get("/v1/models").status_code == 401
            for key in ("first", "second"):
                headers = {"Authorization": f"Bearer {key}"}
                assert client.get("/v1/models", headers=headers).json()["data"][0]["id"] == "mine"
            assert client.get("/metrics", headers=headers).status_code == 200
            with pytest.raises(httpx.TransportError):
                httpx.get(url.replace("https", "http"))
    with process(str(model), "--host", "0.0.0.0", "--quiet") as (running, _):
        assert running.stderr
        assert "give --api-key" in running.stderr.readline()
