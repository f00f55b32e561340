"""A file of prompts, answered by models on many machines: Ray Data spreads it. It needs the extra `cluster`.

Each line of the file is a prompt in JSON: {"prompt": "..."} or {"messages": [...]}, an "id" if it has one, and options
of Model.generate or chat beside them. The answers stand in the order of the prompts.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from gguf_run.formats.atomic import replacing
from gguf_run.formats.errors import GgufRunError, OptionError, check_names
from gguf_run.runtime.load.options import LoadOptions

MOST_ROWS = 256  # prompts that go to a worker together
_NOT_JSON = {"constraint", "logits_processors"}  # options that are objects of Python


class Worker:
    """A model in an actor of Ray, which answers prompts."""

    def __init__(self, model: str, load: LoadOptions, shared: Mapping[str, Any]) -> None:
        """shared: options of all prompts. Errors as Model.load."""
        from gguf_run.runtime.model import Model

        self.model, self.shared = Model.load(model, load), shared
        self.model.engine.start()

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Return lines of JSON for lines of JSON. rows: "number" and "line" of each."""
        started = [self._start(int(number), line) for number, line in zip(rows["number"], rows["line"], strict=True)]
        ended = [_end(*pair) for pair in started]  # all have run together
        lines = [json.dumps(row, ensure_ascii=False) for row in ended]
        return {"line": lines, "is_error": ["error" in row for row in ended]}

    def _start(self, number: int, line: str) -> tuple[Any, Any]:
        """Begin an answer. Return the prompt's id, and the answer or the error."""
        id: Any = number
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
                raise OptionError('a line must be {"prompt": ...} or {"messages": ...}')
            id = row.pop("id", id)
            seed = {"seed": (self.shared["seed"] + number) % 2**64} if "seed" in self.shared else {}
            options = {**self.shared, **seed, **row}
            if found := _NOT_JSON & {*options}:
                raise OptionError(f"{', '.join(found)}: only from Python")
            if "messages" in row:
                return id, self.model.chat(options.pop("messages"), **options)
            return id, self.model.generate(options.pop("prompt"), **options)
        except Exception as error:  # the others go on
            return id, error


def _end(id: Any, answer: Any) -> dict[str, Any]:
    try:
        if isinstance(answer, Exception):
            raise answer
        found = answer.answer()
    except Exception as error:
        return {"id": id, "error": str(error) if isinstance(error, GgufRunError) else repr(error)}
    counts = {"n_prompt": found.n_prompt, "n_decoded": found.n_decoded}
    return {"id": id, "text": found.text, "finish": found.finish, **counts}


def answer_file(
    source: Path, target: Path, model: str, *, n_workers: int, load: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[int, int]:
    """Answer the prompts of a file; return how many there are, and how many of them have an error for an answer.

    target: is written whole or not at all.
    n_workers: models that run.
    load: fields of LoadOptions; one thread and n_seq=16 where it does not say.
    options: of all prompts.
    GgufRunError if Ray is missing or a worker cannot go on, OptionError for values that are not allowed.
    """
    try:
        import ray.data
        from ray.exceptions import RayError
    except ImportError:
        raise GgufRunError('ray is missing: pip install "gguf-run[cluster]"') from None
    check_names(load, (field.name for field in fields(LoadOptions)))
    found = LoadOptions(**{"n_threads": 1, "n_seq": 16, "cache_ram": "auto", **load})
    lines = source.read_text("utf-8").split("\n")  # and not at what else ends lines: it may stand within a text
    rows = [{"number": i, "line": line} for i, line in enumerate(lines, 1) if line.strip()]
    n_blocks = min(len(rows), max(2 * n_workers, -(-len(rows) // MOST_ROWS)))
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    n_errors = 0
    with replacing(target) as part, part.open("w", encoding="utf-8") as file:
        answered = ray.data.from_items(rows, override_num_blocks=n_blocks or 1).map_batches(
            Worker,
            fn_constructor_args=(model, found, options),
            compute=ray.data.ActorPoolStrategy(size=n_workers),
            num_cpus=found.n_threads,
            batch_size=None,  # a block
        )
        try:
            for row in answered.iter_rows():
                file.write(row["line"] + "\n")
                n_errors += row["is_error"]
        except RayError as error:
            raise GgufRunError(f"a worker failed: {str(error).strip().splitlines()[-1]}") from None
    return len(rows), n_errors


def _object(ctx: click.Context, param: click.Parameter, text: str) -> Any:
    with suppress(ValueError):
        if isinstance(found := json.loads(text), dict):
            return found
    raise click.BadParameter(f'{text!r} is no object of JSON, as {{"n_seq": 8}}')


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="A path that each machine has, or hf:owner/repo:TYPE.")
@click.option("--workers", default=1, show_default=True, help="Models that run, on any machines.")
@click.option("--load", callback=_object, default="{}", help='Fields of LoadOptions, as {"n_threads": 8}.')
@click.option("--options", callback=_object, default="{}", help='Options of all prompts, as {"max_tokens": 99}.')
def main(source: Path, target: Path, model: str, workers: int, load: Any, options: Any) -> None:
    """Answer the prompts in SOURCE, JSON in each line; write the answers to TARGET."""
    try:
        n, n_errors = answer_file(source, target, model, n_workers=workers, load=load, options=options)
    except (GgufRunError, OSError, UnicodeDecodeError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{n} prompts, {n_errors} errors", err=True)


if __name__ == "__main__":
    main()
