"""Answers of random models have the form that is asked for, whatever else runs, and no grammar is a bomb."""

import ipaddress
import json
import random
import re
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import date, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinymodel import TINY_GEMMA3, Tiny, vocabulary, write_tiny

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.runtime import Model
from gguf_run.runtime.engine.batch import Batch
from gguf_run.runtime.engine.grammar import MOST_KEPT, Grammar, GrammarConstraint, Grammars
from gguf_run.runtime.engine.reply import Request
from gguf_run.runtime.sampling.params import SamplingParams
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")


def of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


TEXT, NUMBER, FLAG = (
    {"type": "string", "maxLength": 12},
    {"type": "integer", "maximum": 99, "minimum": -9},
    {"type": "boolean"},
)
TREE = {"$defs": {"tree": of(value=FLAG, children={"type": "array", "maxItems": 1, "items": {"$ref": "#/$defs/tree"}})}}
SCHEMAS: dict[str, Any] = {
    "enum": {"enum": ["red", 'a "quoted" ü', 7, None, [1, {"a": 2}]]},
    "const": {"const": {"answer": [42, "é"]}},
    "null": {"type": "null"},
    "flag": FLAG,
    "types": {"type": ["boolean", "null"]},
    "text": TEXT,
    "lengths": {"type": "string", "minLength": 3, "maxLength": 5},
    "no text": {"type": "string", "maxLength": 0},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}(x|yy)?$"},
    "wide pattern": {"type": "string", "pattern": "^é[^a-z]{1,4}$"},
    "date": {"type": "string", "format": "date"},
    "date-time": {"type": "string", "format": "date-time", "maxLength": 30},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "unknown format": {"type": "string", "format": "path", "maxLength": 3},
    "range": {"type": "integer", "minimum": -17, "maximum": 1203},
    "exclusive": {"type": "integer", "exclusiveMinimum": 9, "exclusiveMaximum": 12},
    "real": {"type": "number", "minimum": 0.25, "maximum": 0.5, "pattern": "ignored: not a text"},
    "steps": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 1000},
    "object": of(name=TEXT, age=NUMBER, ok=FLAG),
    "optional": {**of(a=FLAG, b=NUMBER), "required": ["b"]},
    "empty object": {"type": "object", "additionalProperties": False},
    "awkward names": of(**{'a"b': FLAG, "c\\d": FLAG, "ü 你": FLAG, "not": FLAG, "": FLAG}),
    "nested": of(a=of(b=of(c=of(d=FLAG)))),
    "array": {"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [FLAG, NUMBER], "items": False, "minItems": 2},
    "unique is not asked": {"type": "array", "items": FLAG, "maxItems": 3, "uniqueItems": False},
    "any of": {"anyOf": [of(kind={"const": "a"}, x=NUMBER), of(kind={"const": "b"}, y=FLAG), {"type": "null"}]},
    "one of": {"oneOf": [of(kind={"const": "a"}, x=NUMBER), of(kind={"const": "b"}, y=FLAG)]},
    "all of": {"allOf": [{"type": "object", "properties": {"a": FLAG}, "required": ["a"]}, of(a=True, b=NUMBER)]},
    "recursion": {**TREE, "$ref": "#/$defs/tree"},
    "notes": {"title": "T", "description": "d", "x-note": {"not": 1}, "type": "boolean", "deprecated": True},
}  # fmt: skip


def leap(text: str) -> str:
    """Return a date in the year 2000: Python has no year 0, which RFC 3339 has, and llguidance knows no leap years."""
    return f"2000{text[4:]}"


CHECKS: dict[str, Any] = {
    "date": lambda text: date.fromisoformat(leap(text)),
    "date-time": lambda text: datetime.fromisoformat(leap(re.sub(r"\.\d+", "", text)).upper().replace(":60", ":59")),
    "uuid": uuid.UUID,
    "ipv4": ipaddress.IPv4Address,
}


def check(name: str, text: str) -> None:
    """Check an answer with another library, and that its blanks are bounded."""
    value = json.loads(text)
    jsonschema.Draft202012Validator(SCHEMAS[name]).validate(value)
    CHECKS.get(name, lambda value: None)(value)
    outside = re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)
    assert max((len(run) for run in re.findall(r"\s+", outside)), default=0) <= 33


@pytest.fixture(
    scope="module",
    params={"bpe": Tiny(n_ctx=2048), "spm": replace(TINY_GEMMA3, n_ctx=2048)}.items(),
    ids=lambda item: item[0],
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path: Path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny(path, request.param[1])
    with Model.load(path, n_threads=2, n_ctx=2048, n_seq=8, cache_type="f32") as model:
        yield model


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny(path, Tiny(n_ctx=2048))
    return path


@pytest.fixture(scope="module")
def grammars(path: Path) -> Iterator[Grammars]:
    with Model.load(path, n_threads=1) as model:
        grammars = Grammars(model.tokenizer, model.decoder.config.n_vocab)
    yield grammars
    grammars.close()


def _asked(model: Model, schema: Any, **options: Any) -> Request:
    options = {"temperature": 1.5, "max_tokens": 1900, "prompt": "the order", **options}
    return model._request(model.tokenize(options.pop("prompt")), {"json_schema": schema, **options})


def test_answers_are_valid(model: Model) -> None:
    """Each schema thrice, together with the others."""
    names = [name for name in SCHEMAS for _ in range(3)]
    requests = [_asked(model, SCHEMAS[name], seed=i, temperature=1 + i % 2) for i, name in enumerate(names)]
    answers = Batch(model.engine, requests).answers
    assert {answer.finish for answer in answers} == {"stop"}
    for name, answer in zip(names, answers, strict=True):
        check(name, answer.text)
    texts = {name: {answer.text for answer in group} for name, group in _by(names, answers)}
    assert sum(len(found) > 1 for found in texts.values()) > len(SCHEMAS) // 2  # the model chooses


def _by(names: list[str], answers: list[Any]) -> Iterator[tuple[str, list[Any]]]:
    for name, group in groupby(zip(names, answers, strict=True), lambda pair: pair[0]):
        yield name, [answer for _, answer in group]


def test_other_kinds(model: Model) -> None:
    requests = []
    kinds = {
        Grammar("regex", "(the|an?) [a-f]{2,5}!"): r"(the|an?) [a-f]{2,5}!",
        Grammar("lark", 'start: "x" %json {"type": "boolean", "format": "?"} Y // %json {\nY: /y/'): "x(true|false)y",
        Grammar("lark", "start: <|im_start|> /[0-9]{2}/"): "[0-9]{2}",
        Grammar("gbnf", 'root ::= "(" root ")" | [0-9]'): r"\(*[0-9]\)*",
        Grammar("json_object"): r"(?s)\{.*\}",
    }  # fmt: skip
    for grammar in kinds:
        for seed in range(4):
            requests.append(_asked(model, None, grammar=grammar, seed=seed, max_tokens=400))
    answers = Batch(model.engine, requests).answers
    for i, pattern in enumerate(kinds.values()):
        for answer in answers[4 * i : 4 * i + 4]:
            assert answer.finish in ("stop", "length")
            if answer.finish == "stop":
                assert re.fullmatch(pattern, answer.text), answer.text
    assert [answer.finish for answer in answers[:12]] == ["stop"] * 12


def test_who_else_runs_changes_nothing(model: Model) -> None:
    """Free and constrained answers together, with penalties and logprobs, and with rows that are lost meanwhile."""
    options: list[dict[str, Any]] = [
        {"seed": 1}, {"seed": 2, "repeat_penalty": 1.3}, {"seed": 3, "logprobs": 2}, {"seed": 4, "ignore_eos": True},
        {"seed": 5, "mirostat": 2}, {"seed": 6, "temperature": 0.0},
    ]  # fmt: skip
    schema = SCHEMAS["object"]
    alone = [Batch(model.engine, [_asked(model, schema, **more)]).answers[0] for more in options]
    free = Request(model.tokenize("another"), SamplingParams(seed=9), max_tokens=60)
    expected = Batch(model.engine, [free]).answers[0]
    sequences = [model.engine.add(_asked(model, schema, **more)) for more in options]
    other, steps = model.engine.add(free), 0
    while model.engine.step():
        steps += 1
        if steps % 5 == 0 and (running := [job for job in model.engine.jobs if job.row >= 0]):
            model.engine.rows.preempt(random.Random(steps).choice(running))
    together = [sequence.answer() for sequence in sequences]
    assert other.answer() == expected
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    for answer in together:
        assert answer.finish == "stop"
        check("object", answer.text)
    assert len(together[2].logprobs) == len(together[2].ids) + 1  # and that of the end


def test_guesses_change_nothing(path: Path) -> None:
    schema = {"type": "array", "minItems": 12, "maxItems": 12, "items": SCHEMAS["optional"]}
    texts = []
    for speculate in (False, True):
        with Model.load(path, n_threads=2, n_ctx=2048, speculate=speculate, cache_type="f32") as model:
            texts.append(model.complete("a", json_schema=schema, seed=3).text)
            n_guessed = model.stats.n_guessed
    assert texts[0] == texts[1]
    assert n_guessed > 0
    jsonschema.validate(json.loads(texts[0]), schema)


def test_stop_strings_and_limits(model: Model) -> None:
    options: dict[str, Any] = {"json_schema": SCHEMAS["const"], "temperature": 2.0}
    assert re.fullmatch(r'\{\s*"answer"\s*:\s*\[\s*', model.complete("the", stop=["42"], **options).text)
    for n in (1, 2, 3, 5):
        answer = model.complete("the", max_tokens=n, **options)
        assert (len(answer.ids), answer.finish) == (n, "length")


def test_the_last_token_of_a_text_needs_no_step(model: Model) -> None:
    """Forced tokens run together, and nothing runs behind the last one."""
    steps = model.engine.rows.n_steps
    answer = model.complete("the", json_schema=SCHEMAS["const"], temperature=1.0)
    assert model.engine.rows.n_steps - steps < len(answer.ids)
    assert answer.finish == "stop"


def bits(mask: np.ndarray) -> set[int]:
    return {*np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()}


@pytest.mark.parametrize("name", [name for name in SCHEMAS if "empty" not in name])
def test_forced_tokens_are_allowed_ones(model: Model, name: str) -> None:
    """A twin that chooses each token finds the same text. Control tokens are the end or nothing."""
    tokenizer, rng = model.tokenizer, random.Random(name)
    asked = [_asked(model, SCHEMAS[name]).constraint for _ in range(2)]
    one, twin = asked
    assert isinstance(one, GrammarConstraint)
    assert isinstance(twin, GrammarConstraint)
    control = {id for id in range(tokenizer.n_vocab) if not tokenizer.piece(id, skip_special=True)}
    text, is_over = b"", False
    while not is_over:
        allowed = bits(one.allowed())
        assert allowed == bits(twin.allowed())
        assert allowed & control in (set(), tokenizer.stop_ids)
        id = rng.choice(sorted(allowed))
        ids = [id]
        if id not in tokenizer.stop_ids:
            one.accept(id)
            ids += one.forced()
        for id in ids:
            assert id in bits(twin.allowed())
            is_over = id in tokenizer.stop_ids
            if not is_over:
                twin.accept(id)
                text += tokenizer.piece(id)
    check(name, text.decode())


def test_a_token_of_text_that_ends_an_answer_is_no_text() -> None:
    keys = vocabulary(Tiny())
    end = keys["tokens"].index("a")
    metadata = {f"tokenizer.ggml.{key}": value for key, value in {**keys, "eos_token_id": end}.items()}
    tokenizer = Tokenizer.from_metadata(metadata)
    grammars = Grammars(tokenizer, tokenizer.n_vocab + 40)
    constraint = grammars.constraint(Grammar("regex", "[ab]{2}b?"))
    grammars.close()
    b = keys["tokens"].index("b")
    assert bits(constraint.allowed()) == {b}
    constraint.accept(b)
    constraint.accept(b)
    assert bits(constraint.allowed()) == {b, *tokenizer.stop_ids}
    assert end in tokenizer.stop_ids
    constraint.accept(b)
    assert constraint.forced() == [end]


def _nest(n: int, begin: str, end: str, middle: str = '{"type": "null"}') -> str:
    return begin * n + middle + end * n


def _chain(n: int) -> str:
    return json.dumps({"$ref": "#/$defs/0", "$defs": {i: {"$ref": f"#/$defs/{i + 1}"} for i in range(n)} | {n: {}}})


BOMBS = {
    "json_schema": [
        '{"type": "array", "minItems": 1000000000, "items": {"type": "integer"}}',
        '{"type": "string", "minLength": 1000000000}',
        _nest(100, '{"items": ', "}"), _nest(5_000, '{"items": ', "}"), _nest(60_000, "[", "]"),
        _nest(100, '{"allOf": [', "]}"),
        _chain(5_000), '{"$ref": "#"}', '{"allOf": [{"$ref": "#"}, {"type": "object"}]}',
        json.dumps({"pattern": "(a+)+$"}), json.dumps({"pattern": _nest(60_000, "(", ")", "a")}),
        json.dumps({"allOf": [{"type": "string", "pattern": f"^(.*a.{{{i}}}b)*$"} for i in range(50)]}),
        json.dumps({"anyOf": [{"type": "integer", "multipleOf": 9973 - i} for i in range(200)]}),
        json.dumps({"enum": [f"{i:09}" for i in range(100_000)]}),
        json.dumps({"type": "object", "properties": {f"{i}": FLAG for i in range(8_000)}}),
        json.dumps({"type": "integer", "multipleOf": 1000003}),
    ],
    "regex": [
        _nest(60_000, "(", ")", "a"), "a{1000000000}", "((((a{100}){100}){100}){100})", "(.*a.{2000}b)*",
        "(a?){30000}a{30000}",
    ],
    "lark": [
        "start: " + _nest(60_000, "(", ")", '"a"'), 'start: "a"{1000000000}', "start: %json " + _nest(60_000, "[", "]"),
        "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(5_000)), 'start: start start | start | ""',
        "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(40)) + '\nA40: "x"',
    ],
    "gbnf": [
        "root ::= " + _nest(60_000, "(", ")", '"a"'), 'root ::= "a"{1000000000}', 'root ::= root root | root | ""',
        "root ::= a0\n" + "\n".join(f"a{i} ::= a{i + 1}" for i in range(3_000)) + '\na3000 ::= "x"',
        "root ::= a0\n" + "\n".join(f"a{i} ::= a{i + 1} a{i + 1}" for i in range(40)) + '\na40 ::= "x"',
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "text"), [(kind, text) for kind in BOMBS for text in BOMBS[kind]], ids=lambda text: text[:25]
)
def test_bombs(grammars: Grammars, kind: str, text: str) -> None:
    """They are compiled, or refused in one line. Then a few tokens may come."""
    try:
        constraint = grammars.constraint(Grammar(kind, text))
    except OptionError as error:
        assert str(error).startswith(f"the {kind} of the answer: ")  # noqa: PT017
    else:
        try:
            for _ in range(20):
                constraint.accept(min(bits(constraint.allowed())))
        except GgufRunError as error:
            assert str(error).startswith("the grammar of the answer: ")  # noqa: PT017
    assert bits(grammars.constraint(Grammar("json_object")).allowed())


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (of(a={"not": {}}), "the keyword not at #/properties/a is not supported: leave it out"),
        ({"items": [{"if": {}}]}, "the keyword if at #/items/0 is not supported"),
        ({"$defs": {"a": {"uniqueItems": True}}}, "the keyword uniqueItems at #/$defs/a"),
        ({"unevaluatedProperties": False}, "the keyword unevaluatedProperties at # "),
        ({"type": "strin"}, "Invalid type: strin"),
        (
            {"oneOf": [TEXT, {"type": "string"}]},
            "oneOf constraints are not supported whose branches may hold together: write anyOf",
        ),
        ({"type": "string", "enum": [1]}, "Unsatisfiable schema"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "https://example.com/x.json"}, "x.json"),
        ("[1]", "it is [1]; allowed: an object, or true"),
        ("{", "Expecting property name"),
        ({"pattern": 7}, "Expected string for 'pattern'"),
    ],
)
def test_schemas_that_are_refused(grammars: Grammars, schema: Any, words: str) -> None:
    with pytest.raises(OptionError, match=re.escape(words)):
        grammars.constraint(Grammar("json_schema", schema if isinstance(schema, str) else json.dumps(schema)))


def test_few_grammars_are_kept(grammars: Grammars) -> None:
    for i in range(2 * MOST_KEPT):
        grammars.constraint(Grammar("regex", f"a{i}"))
    assert len(grammars._kept) == MOST_KEPT


def test_options_that_exclude_each_other(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Model.load(path, n_threads=1) as model:
        for options in (
            {"json_schema": {}, "grammar": "x"}, {"json_schema": 5}, {"grammar": 5}, {"json_schema": {"a": {1, 2}}},
            {"json_schema": {}, "constraint": object()},
        ):  # fmt: skip
            with pytest.raises(OptionError, match="json_schema"):
                model.generate("a", **options)  # type: ignore[arg-type]
        assert model.complete("a", json_schema=None, grammar=None, max_tokens=3).ids
        monkeypatch.setitem(sys.modules, "llguidance", None)
        model.grammars = None
        with pytest.raises(OptionError, match=re.escape('pip install "gguf-run[serve]"')):
            model.generate("a", json_schema={})
