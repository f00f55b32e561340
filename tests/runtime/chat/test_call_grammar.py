"""Answers under a grammar of calls: whatever a model chooses, its calls are read as valid ones."""

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from answers import TOOLS, calls_of, form, split
from tinyvocab import CONTROL, USER_DEFINED, bpe_metadata

from gguf_run.runtime.chat.answer_parts import TAGS
from gguf_run.runtime.chat.calls.family import Family
from gguf_run.runtime.chat.calls.form import FORMS, GENERIC, Form
from gguf_run.runtime.engine.grammar import Grammar, Grammars
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

pytest.importorskip("llguidance")
NUMBER = {"type": "integer"}
NAMES = [one.name for one in (*FORMS, GENERIC)]
TEXTS = "".join(one.begin + one.head + one.tail + one.end + one.key + one.close + one.quote for one in FORMS)
MARKS = sorted({*re.findall(r"<[^<>\s$=]+>|\[[A-Z_]+\]", TEXTS)})
ENDS = {
    "<|end|>",
    *'"]}',
    "<stop>",
    *TAGS.values(),
    *(one.close.strip() for one in FORMS),
    *(one.quote for one in FORMS),
}
MARKS += [*TAGS, *TAGS.values(), "<|start|>", "<|end|>", "<|call|>", "<|return|>", "<stop>"]


class Vocabulary:
    """A token for each byte and each mark. kind: whether marks are control tokens, or text."""

    def __init__(self, kind: int) -> None:
        special = {mark: CONTROL if mark == "<stop>" else kind for mark in MARKS}
        metadata = bpe_metadata(special=special, eos_token_id=256 + MARKS.index("<stop>"), add_bos_token=False)
        self.tokenizer = Tokenizer.from_metadata(metadata)
        self.grammars = Grammars(self.tokenizer)

    def token_id(self, text: str) -> int | None:
        ids = self.tokenizer.encode(text, add_special=False)
        return ids[0] if len(ids) == 1 and not self.tokenizer.piece(ids[0], skip_special=True) else None

    def answer(self, grammar: str, start: str, rng: random.Random) -> str:
        """Return an answer that begins with `start`, drawn from all that a grammar allows."""
        return next(text for _ in range(20) if (text := self._walk(grammar, start, rng)) is not None)

    def _walk(self, grammar: str, start: str, rng: random.Random) -> str | None:
        """What ends texts is likely. None: the answer has no end within 700 tokens."""
        constraint = self.grammars.constraint(Grammar("lark", grammar))
        ids = list[int]()
        for wanted in [*self.tokenizer.encode(start, add_special=False), *[None] * 700]:
            allowed = np.flatnonzero(np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little")).tolist()
            assert wanted is None or wanted in allowed, self.tokenizer.decode([*ids, wanted])
            weights = [40 if self.tokenizer.token_text(id) in ENDS else 1 if id < 95 else 0.1 for id in allowed]
            id = rng.choices(allowed, weights)[0] if wanted is None else wanted
            if id in self.tokenizer.stop_ids:
                return self.tokenizer.decode(ids)
            constraint.accept(id)
            ids.append(id)
        return None


@pytest.fixture(scope="module", params=[CONTROL, USER_DEFINED], ids=["control", "text"])
def vocabulary(request: pytest.FixtureRequest) -> Iterator[Vocabulary]:
    vocabulary = Vocabulary(request.param)
    yield vocabulary
    vocabulary.grammars.close()


def check(form: Form, name: str, arguments: dict[str, Any]) -> None:
    """The arguments fit the schema of their tool, as far as its form says."""
    known = {"get_weather": {"city", "unit"}, "add-x": {*"abcd"}}
    if name in known:
        assert arguments.keys() <= known[name]
    if name == "get_weather":
        assert isinstance(arguments["city"], str)
        assert arguments.get("unit", "C") in ("C", "F")
    elif name == "add-x":
        assert 0 <= arguments["a"] <= 99
        assert all(isinstance(item, str) and (form.quote or len(item) <= 5) for item in arguments["b"])
        assert arguments.get("c") in (True, False, None)
        assert arguments.get("d", {}).keys() <= {"k"}
    else:
        assert (name, arguments) == ("now", {})


@pytest.mark.parametrize("name", NAMES)
def test_calls_that_are_required(vocabulary: Vocabulary, name: str) -> None:
    rng, one = random.Random(name), form(name)
    for choice, parallel in (("required", True), ("required", False), ("add-x", False)):
        for tag, prompt, start in ((None, "", ""), ("<think>", "<think>\n", "Hm.</think>\n"), ("<think>", "", "")):
            if name == "gpt-oss":
                start = start and "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
                tag, prompt = None, ""
            grammar = Family(one, tag).call_grammar(
                TOOLS, choice, parallel=parallel, prompt=prompt, token_id=vocabulary.token_id
            )
            assert grammar is not None
            text = vocabulary.answer(grammar, start, rng)
            parts = [part for part in split(one, text, prompt) if part[0] != "reasoning"]
            assert {kind for kind, _ in parts} == {"call", "arguments"}
            calls = calls_of(parts)
            assert parallel or len(calls) == 1
            for called, arguments in calls:
                assert choice in ("required", called)
                check(one, called, arguments)


@pytest.mark.parametrize("name", NAMES)
def test_calls_within_text(vocabulary: Vocabulary, name: str) -> None:
    """A mark within reasoning is none; behind it there are only valid calls."""
    rng, one = random.Random(name), form(name)
    options: dict[str, Any] = {"parallel": True, "token_id": vocabulary.token_id}
    if one.openers:
        assert Family(one).call_grammar(TOOLS, "auto", prompt="", **options) is None
        return
    mark = one.triggers[0]
    if name == "gpt-oss":
        begin = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>"
        cases = [(None, "", f"{begin}commentary to="), (None, "", f"{begin}final<|message|>Hi")]
    else:
        cases = [(None, "", f"Hi < {mark}"), ("<think>", "<think>", f"H</think>Hi {mark}"), (None, "", "Hi <")]
        cases += [("<think>", "", f"<think>{mark if vocabulary.token_id(mark) is None else ''} H</think>Hi {mark}")]
    for tag, prompt, start in cases:
        grammar = Family(one, tag).call_grammar(TOOLS, "auto", prompt=prompt, **options)
        assert grammar is not None
        parts = split(one, vocabulary.answer(grammar, start, rng), prompt)
        assert ("call" in dict(parts)) >= start.endswith((mark, "to="))
        for called, arguments in calls_of(parts):
            check(one, called, arguments)


def test_tools_of_all_shapes(vocabulary: Vocabulary) -> None:
    """Schemas that say nothing or refer to others; arguments that no schema names."""
    node = {
        "type": "object",
        "properties": {"next": {"$ref": "#/$defs/node"}, "n": NUMBER},
        "additionalProperties": False,
    }
    shapes: list[Any] = [
        *(None, {}, {"type": "object"}),
        {"properties": {"a": True, "b": {}, "c": {"type": ["array"], "items": NUMBER}}},
        {"$defs": {"node": node}, "properties": {"a": {"$ref": "#/$defs/node"}}, "required": ["a"]},
        {"properties": {"a": {"anyOf": [NUMBER, {"enum": ["x", 5]}]}}},
    ]
    rng = random.Random(3)
    for shape in shapes:
        tools = [{"type": "function", "function": {"name": "f", "parameters": shape}}]
        for one in (*FORMS, GENERIC):
            grammar = Family(one).call_grammar(
                tools, "required", parallel=False, prompt="", token_id=vocabulary.token_id
            )
            assert grammar is not None
            parts = split(one, vocabulary.answer(grammar, "", rng), tools=tools)
            parts = [part for part in parts if part[0] != "reasoning"]
            assert [kind for kind, _ in parts] == ["call", "arguments"]
            assert isinstance(json.loads(parts[1][1]), dict)
