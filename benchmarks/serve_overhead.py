"""Measures the Python of the server: streams over a decoder that computes nothing and waits instead.

    python benchmarks/serve_overhead.py MODEL [-n 1,16,64] [-s 40]

MODEL gives tokenizer and chat template. "engine" is what the engine's thread takes between two steps, "loop" what the
thread takes that talks to the clients, both in microseconds of processor time per step. While a real step computes,
only the loop works.
"""

import json
import multiprocessing
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import uvicorn
from engine_overhead import _Decoder

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.models.backend import Results
from gguf_run.runtime.load.load_model import LoadedModel
from gguf_run.runtime.model import Model
from gguf_run.runtime.serve.app import make_app
from gguf_run.runtime.serve.registry import Registry
from gguf_run.runtime.serve.server import Server
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer


class _Waiting(_Decoder):
    """Waits in a step, as if kernels ran. Notes when the engine's thread is at work."""

    def __init__(self, n_seq: int, tokenizer: Tokenizer, step_ms: float) -> None:
        super().__init__(n_seq, 4096)
        self.config = SimpleNamespace(n_vocab=tokenizer.n_vocab, n_layer=1, n_embd=1, arch=SimpleNamespace(name="none"))
        self._logits = np.zeros((n_seq, tokenizer.n_vocab), np.float32)
        self._logits[:, tokenizer.encode(" the")[-1]] = 50
        self.step_s, self.times, self.rows = step_ms / 1000, list[float](), list[int]()
        self.loop_clock, self.loop_times = 0, list[float]()

    def top(self, batch: Mapping[int, Sequence[int]], rows: Mapping[int, int], tops: Sequence[None]) -> Results:
        self.times.append(time.thread_time())
        self.loop_times.append(time.clock_gettime(self.loop_clock))
        self.rows.append(len(batch))
        results = super().top(batch, rows, tops)
        time.sleep(self.step_s)
        return results

    def close(self) -> None:
        """Nothing is held."""


class _Same:
    """Chooses the same token for all."""

    def __init__(self, id: int) -> None:
        self._id = id

    def sample(self, rows: Sequence[Any], logits: Any) -> list[int]:
        return [self._id] * len(rows)


def _serve(path: str, n: int, step_ms: float, pipe: Any) -> None:
    with GGUFFile.open(path) as file:
        tokenizer, template = Tokenizer.from_metadata(file.metadata), file.metadata["tokenizer.chat_template"]
    decoder: Any = _Waiting(n, tokenizer, step_ms)
    same: Any = _Same(tokenizer.encode(" the")[-1])
    registry = Registry({"m": path}, lambda *_: Model(LoadedModel(decoder, tokenizer, template, many=lambda: same)))
    server = uvicorn.Server(uvicorn.Config(make_app(Server(registry)), port=0, log_level="error", access_log=False))
    decoder.loop_clock = time.pthread_getcpuclockid(threading.get_ident())

    def watch() -> None:
        while not (server.started and registry.loaded):
            time.sleep(0.01)
        pipe.send(server.servers[0].sockets[0].getsockname()[1])
        pipe.recv()
        server.should_exit = True

    threading.Thread(target=watch).start()
    server.run()
    full = [i for i, rows in enumerate(decoder.rows) if rows == n]
    engine, loop = (1e6 * np.diff(np.array(times)[full[5:]]) for times in (decoder.times, decoder.loop_times))
    pipe.send((float(np.median(engine)), float(np.median(loop)), len(full)))


def _client(port: int, n: int, n_tokens: int) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": n_tokens}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(n)]
    for connection in connections:
        connection.sendall(head + body)
    for connection in connections:
        found = b""
        while b"[DONE]" not in found:
            found = found[-20:] + connection.recv(1 << 16)
        connection.close()


@click.command()
@click.argument("model")
@click.option("-n", "--streams", default="1,16,64", show_default=True)
@click.option("-s", "--step-ms", default=40.0, show_default=True, help="How long a step waits.")
@click.option("-t", "--tokens", default=100, show_default=True, help="Tokens of each answer.")
def main(model: str, streams: str, step_ms: float, tokens: int) -> None:
    """Print microseconds per step."""
    for n in map(int, streams.split(",")):
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=_serve, args=(model, n, step_ms, theirs))
        process.start()
        _client(ours.recv(), n, tokens)
        ours.send("end")
        engine, loop, n_full = ours.recv()
        process.join()
        click.echo(f"{n} streams, {n_full} steps: engine {engine:.0f} us, loop {loop:.0f} us a step")


if __name__ == "__main__":
    main()
