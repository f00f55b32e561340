"""The real server on a socket, over a model that says what a script tells it to, or over any other model.

The scripted model has the real engine, cache, tokenizer (a token for each byte) and chat template; only its logits are
made up.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import uvicorn
from fake_decoder import FakeDecoder
from tinyvocab import CONTROL, USER_DEFINED, bpe_metadata

from gguf_run.runtime.load.load_model import LoadedModel
from gguf_run.runtime.model import Model
from gguf_run.runtime.serve.app import make_app
from gguf_run.runtime.serve.connection import make_config
from gguf_run.runtime.serve.registry import Registry
from gguf_run.runtime.serve.server import Server
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

BEGIN = "<|im_start|>assistant\n"  # an answer begins behind it
# Of the family of Hermes and Qwen.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools: <tool_call>\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = {"<|im_start|>": CONTROL, "<|im_end|>": CONTROL}
Script = Callable[[str], str] | Mapping[str, str]  # the answer to a prompt, or answers by a part of the prompt


def tokenizer_of(special: Sequence[str] = ()) -> Tokenizer:
    """A token for each byte, and special ones, of which <|im_end|> ends an answer. special: more control tokens."""
    names = SPECIAL | dict.fromkeys(special, CONTROL) | {"<tool_call>": USER_DEFINED, "</tool_call>": USER_DEFINED}
    metadata = bpe_metadata(special=names, eos_token_id=256 + list(names).index("<|im_end|>"), add_bos_token=False)
    return Tokenizer.from_metadata(metadata)


class ScriptedDecoder(FakeDecoder):
    """Says what the script tells, one byte after the other, then <|im_end|>. Prompts without a chat get "abcabc..."."""

    def __init__(self, tokenizer: Tokenizer, script: Script, delay_s: float = 0.0, **sizes: Any) -> None:
        """delay_s: seconds that a step takes."""
        super().__init__(**sizes)
        self.tokenizer, self.script, self.delay_s = tokenizer, script, delay_s
        self.config = SimpleNamespace(n_vocab=tokenizer.n_vocab, arch=SimpleNamespace(name="scripted"), n_layer=1,
                                      n_embd=8, n_ctx_train=self.n_ctx)  # fmt: skip
        self.keeps_runs, self.has_logits = False, True
        self._answers: dict[tuple[int, ...], list[int]] = {}  # by prompts

    def close(self) -> None:
        """Nothing is held."""

    def step(self, batch: Mapping[int, Sequence[int]], rows: Mapping[int, int]) -> np.ndarray:
        time.sleep(self.delay_s)
        texts = {}
        for seq, ids in batch.items():
            known = [*self.cache.slots[seq].ids, *ids]
            for i in range(rows[seq]):
                texts[seq, i] = known[: len(known) - rows[seq] + 1 + i]
        super().step(batch, rows)
        logits = np.zeros((len(texts), self.tokenizer.n_vocab), np.float32)
        logits[np.arange(len(texts)), [self._next(ids) for ids in texts.values()]] = 50
        return logits

    def _next(self, ids: list[int]) -> int:
        begin = self.tokenizer.encode(BEGIN)
        n_prompt = len(ids) - 1 - ids[::-1].index(begin[0]) if begin[0] in ids else 0
        if ids[n_prompt:][: len(begin)] != begin:
            return self.tokenizer.encode("abc"[len(ids) % 3])[0]
        prompt = tuple(ids[:n_prompt])
        if prompt not in self._answers:
            self._answers[prompt] = self._answer(self.tokenizer.decode(prompt))
        return [*self._answers[prompt][len(ids) - n_prompt - len(begin) :][:1], *self.tokenizer.stop_ids][0]

    def _answer(self, prompt: str) -> list[int]:
        if callable(self.script):
            return self.tokenizer.encode(self.script(prompt))
        return self.tokenizer.encode(next((answer for part, answer in self.script.items() if part in prompt), "Hello!"))


def scripted(
    script: Script = {},  # noqa: B006
    *,
    template: str = TEMPLATE,
    special: Sequence[str] = (),
    **sizes: Any,
) -> Model:
    """Return a model that answers as the script tells. sizes: of ScriptedDecoder."""
    tokenizer = tokenizer_of(special)
    decoder: Any = ScriptedDecoder(tokenizer, script, **sizes)
    return Model(LoadedModel(decoder, tokenizer, template))


class Serving:
    """A server that listens."""

    def __init__(self, url: str, server: Server, uvicorn_server: uvicorn.Server) -> None:
        self.url, self.server, self.uvicorn = url, server, uvicorn_server
        self.host, self.port = "127.0.0.1", int(url.rsplit(":", 1)[1])

    @property
    def model(self) -> Model:
        """The first model."""
        return next(iter(self.server.registry.loaded.values())).model


@contextmanager
def serving(
    *models: Model | Callable[[], Model],
    app: Callable[[Server], Any] = make_app,
    registry: Mapping[str, Any] = {},
    **options: Any,
) -> Iterator[Serving]:
    """Serve models, named m0, m1, ..., on a free port of this machine. A function makes its model each time anew.

    registry: options of Registry. options: of Server.
    """
    named = {f"m{i}": model for i, model in enumerate(models)}

    def load(path: str, progress: Any) -> Model:
        found = named[path]
        return found if isinstance(found, Model) else found()

    known = Registry({name: name for name in named}, load, **{"max_models": len(models), **registry})
    server = Server(known, **options)
    config = make_config(app(server), host="127.0.0.1", port=0)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not (running.started and known.loaded) and thread.is_alive():
            time.sleep(0.005)
        port = running.servers[0].sockets[0].getsockname()[1]
        yield Serving(f"http://127.0.0.1:{port}", server, running)
    finally:
        running.should_exit = True
        thread.join()
