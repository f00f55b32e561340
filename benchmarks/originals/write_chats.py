"""Conversations that a chat model writes by itself: a user's message at temperature 1, then the answer.

    python benchmarks/originals/write_chats.py MODEL.gguf CHATS.json [--count 600] [--minutes 5]

The chat template up to where a user's message begins is the prompt, so that the model invents the message (Magpie).
CHATS.json is a list of texts in the model's own template; a run adds to it.
"""

import json
import time
from functools import partial
from pathlib import Path

import click

from gguf_run.runtime.model import Model

_AT_ONCE = 64
_ASKED, _SAID = 96, 320  # the most tokens of a message and of its answer


@click.command()
@click.argument("model_path", type=click.Path(path_type=Path))
@click.argument("chats_path", type=click.Path(path_type=Path))
@click.option("--count", default=600, help="Conversations in the file at the end.")
@click.option("--minutes", default=5.0, help="Begin no further batch after so long.")
def main(model_path: Path, chats_path: Path, count: int, minutes: float) -> None:
    """Write conversations of MODEL into CHATS.json."""
    until = time.monotonic() + 60 * minutes
    chats = json.loads(chats_path.read_text()) if chats_path.exists() else []
    with Model.load(model_path, n_seq=_AT_ONCE, n_ctx=1024) as model:
        write = partial(model.generate_batch, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)  # its own distribution
        opening = model.chat_prompt("?").partition("?<|im_end|>")[0]
        while len(chats) < count and time.monotonic() < until:
            seed = 1 + 2 * len(chats)
            asked = write([opening] * _AT_ONCE, max_tokens=_ASKED, seed=seed)
            messages = [answer.text.strip() for answer in asked if answer.finish == "stop"]
            prompts = [model.chat_prompt(message) for message in messages if message]
            answers = write(prompts, max_tokens=_SAID, seed=seed + _AT_ONCE)
            ends = ["<|im_end|>\n" if answer.finish == "stop" else "" for answer in answers]
            chats += [prompt + answer.text + end for prompt, answer, end in zip(prompts, answers, ends, strict=True)]
            chats_path.write_text(json.dumps(chats))
            click.echo(f"{len(chats)} conversations, {sum(map(len, chats)):,} characters")


if __name__ == "__main__":
    main()
