"""Texts to learn from: a folder with train.jsonl, valid.jsonl and test.jsonl, one JSON object a line.

    {"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}    a conversation; tools may be left out
    {"prompt": ..., "completion": ...}                                    a question and its answer
    {"text": ...}                                                         any text

These are the forms of mlx-lm. A text file in place of the folder is cut into pieces of the greatest length.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import FormatError, GgufRunError, OptionError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.chat.process import TemplateProcess
from gguf_run.runtime.chat.template import render_chat
from gguf_run.runtime.load.load_model import chat_template
from gguf_run.runtime.terminal.text_input import read_text
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

_FORMS = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'
_PAD = 32  # batches are filled up to a multiple of this length


@dataclass(frozen=True)
class Example:
    """One text."""

    ids: tuple[int, ...]
    n_prompt: int  # first tokens that nothing is learned from


@dataclass
class Reader:
    """Makes tokens of texts, as a model sees them when it answers."""

    file: GGUFFile
    n_most: int  # tokens of a text; what is longer is cut
    mask_prompt: bool = False  # nothing is learned from prompts, and from all but the last message
    process: TemplateProcess = field(default_factory=TemplateProcess)

    def __post_init__(self) -> None:
        self.tokenizer = Tokenizer.from_metadata(self.file.metadata)
        self._template = chat_template(self.file.metadata)

    def read(self, data: Path, name: str) -> list[Example]:
        """Return the examples of `name`.jsonl, or of a text file; [] if the folder has no such file."""
        if data.is_file():
            return self._pieces(data, name)
        path = data / f"{name}.jsonl"
        if not path.is_file():
            if not data.is_dir():
                raise OptionError(f"--data {data}: is no folder: name one with train.jsonl, or a text file")
            return []
        lines = [(n, line) for n, line in enumerate(read_text(path).splitlines(), 1) if line.strip()]
        if not lines:
            raise FormatError(f"{path}: is empty: a line for each text is needed, {_FORMS}")
        found = [self._example(line, f"{path}: line {n}") for n, line in lines]
        if n_long := sum(len(one.ids) > self.n_most for one in found):
            what = f"{n_long} of {len(found)} texts are longer than {self.n_most} tokens: their ends are left out"
            warnings.warn(f"{path}: {what} (--max-seq-length)", stacklevel=2)
        kept = [Example(one.ids[: self.n_most], one.n_prompt) for one in found]
        kept = [one for one in kept if len(one.ids) > max(1, one.n_prompt)]
        if not kept:
            raise FormatError(f"{path}: no text has a token to learn within {self.n_most}: raise --max-seq-length")
        return kept

    def _pieces(self, path: Path, name: str) -> list[Example]:
        """Return the pieces of a text: the last twentieth is for validation."""
        ids = tuple(self.tokenizer.encode(read_text(path), parse_special=False))
        pieces = [Example(ids[at : at + self.n_most], 0) for at in range(0, len(ids) - 1, self.n_most)]
        n_valid = len(pieces) // 20
        if not pieces:
            raise FormatError(f"{path}: has no text")
        return {"train": pieces[: len(pieces) - n_valid], "valid": pieces[len(pieces) - n_valid :]}.get(name, [])

    def _example(self, line: str, place: str) -> Example:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{place} is not JSON ({error}): one object a line is allowed, {_FORMS}") from None
        keys = value.keys() if isinstance(value, dict) else ()
        try:
            if "messages" in keys:
                return self._chat(value["messages"], value.get("tools"))
            if isinstance(value, dict) and {"prompt", "completion"} <= {*keys}:
                return self._completion(_text(value, "prompt"), _text(value, "completion"))
            if "text" in keys:
                ids = self.tokenizer.encode(_text(value, "text"))
                return Example(self._ended(ids), 0)
        except GgufRunError as error:
            raise type(error)(f"{place}: {error}") from None
        found = f"the keys {', '.join(map(str, keys)) or 'none'}" if isinstance(value, dict) else "no object"
        raise FormatError(f"{place} has {found[:200]}: allowed are {_FORMS}")

    def _ended(self, ids: Sequence[int]) -> tuple[int, ...]:
        eos = self.tokenizer.eos
        return (*ids, eos) if eos is not None and (not ids or ids[-1] != eos) else tuple(ids)

    def _completion(self, prompt: str, completion: str) -> Example:
        if self._template is not None:
            user, answer = (
                {"role": role, "content": text} for role, text in (("user", prompt), ("assistant", completion))
            )
            return self._chat([user, answer], None)
        before = self.tokenizer.encode(prompt)
        ids = [*before, *self.tokenizer.encode(completion, add_special=False)]
        return Example(self._ended(ids), len(before) if self.mask_prompt else 0)

    def _chat(self, messages: Any, tools: Any) -> Example:
        if not isinstance(messages, list) or not messages:
            raise FormatError('"messages" must be a list of messages, at least one')
        if self._template is None:
            raise FormatError('the model has no chat template: give its data as {"text": ...}')
        ids = self._rendered(messages, tools, False)
        if not self.mask_prompt:
            return Example(tuple(ids), 0)
        prompt = self._rendered(messages[:-1], tools, True) if len(messages) > 1 else []
        differs = [i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b]
        return Example(tuple(ids), differs[0] if differs else min(len(prompt), len(ids)))

    def _rendered(self, messages: Any, tools: Any, asks: bool) -> list[int]:
        tokenizer = self.tokenizer
        bos, eos = (None if id is None else tokenizer.token_text(id) for id in (tokenizer.bos, tokenizer.eos))
        assert self._template is not None
        text = render_chat(
            self._template, messages, bos_token=bos, eos_token=eos, add_generation_prompt=asks, tools=tools,
            process=self.process,
        )  # fmt: skip
        return tokenizer.encode_chat(text)


def _text(value: Mapping[str, Any], key: str) -> str:
    if not isinstance(value[key], str):
        raise FormatError(f'"{key}" is no string')
    text: str = value[key]
    return text


@dataclass(frozen=True)
class Batch:
    """Texts that are learned from at once."""

    ids: NDArray[np.int64]  # [n_seq, n_tokens]
    targets: NDArray[np.int64]  # as ids: the token that follows, -1 where nothing is learned

    @property
    def n_tokens(self) -> int:
        """Tokens that are learned."""
        return int((self.targets >= 0).sum())


class Batches:
    """Batches of texts of nearly one length, in an order that a seed makes."""

    def __init__(self, examples: Sequence[Example], size: int, seed: int, n_most: int) -> None:
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
        self._examples, self._seed, self._n_most = examples, seed, n_most
        self._parts = [order[at : at + size] for at in range(0, len(order), size)]

    def __len__(self) -> int:
        return len(self._parts)

    def at(self, step: int) -> Batch:
        """Return the batch of a step from 0 on. Each round through the texts has an order of its own."""
        turn, place = divmod(step, len(self._parts))
        order = np.random.default_rng([self._seed, turn]).permutation(len(self._parts))
        return self.batch([self._examples[i] for i in self._parts[order[place]]])

    def in_order(self, n: int) -> list[Batch]:
        """Return the first n batches, -1 for all."""
        parts = self._parts if n < 0 else self._parts[:n]
        return [self.batch([self._examples[i] for i in part]) for part in parts]

    def batch(self, examples: Sequence[Example]) -> Batch:
        longest = max(len(one.ids) for one in examples) - 1
        n = min(longest + -longest % _PAD, max(longest, self._n_most - 1))
        ids, targets = np.zeros((len(examples), n), np.int64), np.full((len(examples), n), -1, np.int64)
        for row, one in enumerate(examples):
            ids[row, : len(one.ids) - 1] = one.ids[:-1]
            first = max(1, one.n_prompt)
            targets[row, first - 1 : len(one.ids) - 1] = one.ids[first:]
        return Batch(ids, targets)
