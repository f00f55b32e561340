"""Answers of a form against free ones, in tokens per second, and what their masks cost.

    python benchmarks/grammar.py MODEL.gguf [-n 16] [--rounds 5]

`texts` is an array of texts, where the model chooses nearly every token. `keys` is an array of objects, whose names are
forced. The kinds run in turns, and the best round of each counts.
"""

import json
import time
from typing import Any

import click
import numpy as np

from gguf_run.runtime import Model
from gguf_run.runtime.engine.batch import Batch
from gguf_run.runtime.engine.grammar import Grammar, Grammars

TEXT = {"type": "string"}
CITY = {"name_of_the_city": TEXT, "number_of_inhabitants": {"type": "integer"}, "is_the_capital": {"type": "boolean"}}
OBJECT = {"type": "object", "properties": CITY, "required": [*CITY], "additionalProperties": False}
KINDS: dict[str, Any] = {
    "free": None,
    "texts": {"type": "array", "items": TEXT, "minItems": 1000},
    "keys": {"type": "array", "items": OBJECT, "minItems": 1000},
}


def tokens_per_second(model: Model, schema: Any, n: int, max_tokens: int) -> float:
    """Return the speed of n answers together, without their first tokens."""
    options = {"json_schema": schema, "max_tokens": max_tokens, "ignore_eos": True}
    requests = [model._request(model.tokenize("List cities."), {**options, "seed": i}) for i in range(n)]
    batch = Batch(model.engine, requests)
    return batch.n_decoded / batch.decode_s


def microseconds(model: Model, schema: str) -> list[float]:
    """Return the mean times of a constraint's three calls, over 300 random tokens."""
    grammars = model.grammars = model.grammars or Grammars(model.tokenizer, model.decoder.config.n_vocab)
    constraint, rng = grammars.constraint(Grammar("json_schema", schema)), np.random.default_rng(0)
    times = np.zeros(4)
    for _ in range(300):
        start = time.perf_counter()
        mask = constraint.allowed()
        masked = time.perf_counter()
        id = int(rng.choice(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))))
        chosen = time.perf_counter()
        constraint.accept(id)
        accepted = time.perf_counter()
        constraint.forced()
        times += masked - start, chosen - masked, accepted - chosen, time.perf_counter() - accepted
    return [1e6 * float(times[i]) / 300 for i in (0, 2, 3)]


@click.command()
@click.argument("path")
@click.option("--max-tokens", "-n", default=16, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def main(path: str, max_tokens: int, rounds: int) -> None:
    """Print a table."""
    with Model.load(path, n_ctx=1024, n_seq=4) as model:
        for n in (1, 4):
            best = dict.fromkeys(KINDS, 0.0)
            for i in range(rounds + 1):  # the first warms up
                for kind, schema in KINDS.items():
                    speed = tokens_per_second(model, schema, n, max_tokens if i else 4)
                    best[kind] = max(best[kind], speed if i else 0.0)
            shares = (f"{kind} {speed:.1f} ({speed / best['free']:.0%})" for kind, speed in best.items())
            print(f"{n} sequences, tokens/s: {', '.join(shares)}")
        for kind in ("texts", "keys"):
            allowed, accept, forced = microseconds(model, json.dumps(KINDS[kind]))
            print(f"{kind}: mask {allowed:.0f} us, accept {accept:.0f} us, forced {forced:.0f} us")


if __name__ == "__main__":
    main()
