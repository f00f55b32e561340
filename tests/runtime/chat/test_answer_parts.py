"""Answers of models in parts: what their templates write for calls is read back, however the text is cut."""

import json
import re
import warnings
from contextlib import suppress
from typing import Any

import pytest
from answers import CALLS, TOOLS, calls_of, form, split
from chat_templates import FOLDER
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.chat.answer_parts import TAGS
from gguf_run.runtime.chat.calls.family import family_of
from gguf_run.runtime.chat.calls.form import FORMS, GENERIC, Form
from gguf_run.runtime.chat.calls.tools import types_of, value_json
from gguf_run.runtime.chat.process import TemplateProcess
from gguf_run.runtime.chat.template import render_chat

W, A = (json.dumps(arguments, ensure_ascii=False) for _, arguments in CALLS)
WO, AO = (json.dumps({"name": n, "arguments": a}, ensure_ascii=False) for n, a in CALLS)
# What the templates of the models write, text and two calls, or one call where a model makes only one.
ANSWERS = {
    "gpt-oss": "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>Let me."
    f"<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{W}<|call|>",
    "gemma4": '<|channel>thought\nHm.\n<channel|>Let me.<|tool_call>call:get_weather{city:<|"|>Zürich<|"|>}<tool_call|>'
    '<|tool_call>call:add-x{a:1,b:[<|"|>x<|"|>,<|"|>y\n"{<|"|>],c:true,d:{k:None}}<tool_call|>',
    "functiongemma": "Let me.<start_function_call>call:get_weather{city:<escape>Zürich<escape>}<end_function_call>"
    '<start_function_call>call:add-x{a:1,b:[<escape>x<escape>,<escape>y\n"{<escape>],c:true,d:{k:null}}'
    "<end_function_call>",
    "mistral-3.2": f"Let me.[TOOL_CALLS]get_weather[CALL_ID]call12345[ARGS]{W}[TOOL_CALLS]add-x[CALL_ID]1[ARGS]{A}",
    "mistral": f"[THINK]Hm.[/THINK]Let me.[TOOL_CALLS]get_weather[ARGS]{W}[TOOL_CALLS]add-x[ARGS]{A}",
    "mistral-nemo": f'Let me.[TOOL_CALLS] [{WO[:-1]}, "id": "call12345"}}, {AO[:-1]}, "id": "call12346"}}]',
    "deepseek-r1": "<think>\nHm.\n</think>\n\nLet me.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>"
    f"get_weather\n```json\n{W}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>add-x\n```json\n{A}\n"
    "```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek-v3.1": f"Let me.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{W}"
    f"<｜tool▁call▁end｜><｜tool▁call▁begin｜>add-x<｜tool▁sep｜>{A}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "minimax-m2": '<think>\nHm.\n</think>\n\nLet me.\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter '
    'name="city">Zürich</parameter>\n</invoke>\n<invoke name="add-x">\n<parameter name="a">1</parameter>\n'
    '<parameter name="b">["x", "y\\n\\"{"]</parameter>\n<parameter name="c">true</parameter>\n'
    '<parameter name="d">{"k": null}</parameter>\n'
    "</invoke>\n</minimax:tool_call>",
    "seed-oss": "<seed:think>Hm.</seed:think>Let me.\n\n<seed:tool_call>\n<function=get_weather>\n<parameter=city>"
    "Zürich</parameter>\n</function>\n</seed:tool_call>\n<seed:tool_call>\n<function=add-x>\n<parameter=a>1</parameter>\n"
    "<parameter=b>['x', 'y\\n\"{']</parameter>\n<parameter=c>True</parameter>\n<parameter=d>{'k': None}</parameter>\n"
    "</function>\n</seed:tool_call>",
    "qwen3-coder": "Let me.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nZürich\n</parameter>\n</function>"
    "\n</tool_call>\n<tool_call>\n<function=add-x>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n"
    '["x", "y\\n\\"{"]\n</parameter>\n<parameter=c>\nTrue\n</parameter>\n<parameter=d>\n{"k": null}\n</parameter>\n'
    "</function>\n</tool_call>",
    "glm-4.7": "<think>Hm.</think>Let me.<tool_call>get_weather<arg_key>city</arg_key><arg_value>Zürich</arg_value>"
    "</tool_call><tool_call>add-x<arg_key>a</arg_key><arg_value>1</arg_value><arg_key>b</arg_key><arg_value>"
    '["x", "y\\n\\"{"]</arg_value><arg_key>c</arg_key><arg_value>true</arg_value><arg_key>d</arg_key><arg_value>'
    '{"k": null}</arg_value></tool_call>',
    "glm": "\n<think>Hm.</think>\nLet me.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Zürich"
    "</arg_value>\n</tool_call>\n<tool_call>add-x\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>b</arg_key>\n<arg_value>"
    '["x", "y\\n\\"{"]</arg_value>\n<arg_key>c</arg_key>\n<arg_value>true</arg_value>\n<arg_key>d</arg_key>\n'
    '<arg_value>{"k": null}</arg_value>\n</tool_call>',
    "command-r": f'<|START_THINKING|>Hm.<|END_THINKING|>Let me.<|START_ACTION|>[\n    {{"tool_call_id": "0", '
    f'"tool_name": "get_weather", "parameters": {W}}},\n    {{"tool_call_id": "1", "tool_name": "add-x", '
    f'"parameters": {A}}}\n]<|END_ACTION|>',
    "nemotron": f"<think>\nHm.\n</think>\nLet me.\n<TOOLCALL>[{WO}, {AO}]</TOOLCALL>",
    "apriel": f"Let me.\n<tool_calls>[{WO}, {AO}]</tool_calls>",
    "granite": f"Let me.<|tool_call|>[{WO}, {AO}]",
    "hermes": f"<think>\nHm.\n</think>\n\nLet me.\n<tool_call>\n{WO}\n</tool_call>\n<tool_call>\n{AO}\n</tool_call>\n",
    "llama3": f'<|python_tag|>{{"name": "get_weather", "parameters": {W}}}',
    "generic": f"```json\n{WO}\n```",
}  # fmt: skip


@pytest.mark.parametrize("name", [one.name for one in (*FORMS, GENERIC)])
def test_what_templates_write_is_read_back_however_it_is_cut(name: str) -> None:
    answer, one = ANSWERS[name], form(name)
    whole = split(one, [answer])
    n_calls = 2 if answer.count("add-x") else 1
    assert calls_of(whole) == CALLS[:n_calls]
    before = [(kind, text) for kind, text in whole if kind in ("reasoning", "text")]
    thought = [("reasoning", "Hm.")] if "Hm." in answer else []
    assert before == thought + ([("text", "Let me.")] if "Let me." in answer else [])
    assert split(one, answer) == whole
    for i in range(len(answer) + 1):
        assert split(one, [answer[:i], answer[i:]]) == whole
        # What comes of a beginning is a beginning of the whole.
        now = split(one, [answer[:i]], whole=False)
        assert all(found == wanted for found, wanted in zip(now[:-1], whole, strict=False))
        assert not now or (now[-1][0], whole[len(now) - 1][1].startswith(now[-1][1])) == (whole[len(now) - 1][0], True)


@pytest.mark.parametrize("name", [one.name for one in (*FORMS, GENERIC)])
def test_an_answer_that_breaks_off(name: str) -> None:
    """Nothing is invented: arguments that broke off are no JSON, or those that were whole."""
    answer, one = ANSWERS[name], form(name)
    whole = split(one, [answer])
    for i in range(len(answer)):
        parts = split(one, [answer[:i]])
        for (kind, text), wanted in zip(parts, whole, strict=False):
            if kind == wanted[0] == "arguments" and text != wanted[1]:
                with suppress(ValueError):
                    assert json.loads(text).items() <= json.loads(wanted[1]).items()


OTHER_FORMS = [
    # Models forget marks, and write members in another order.
    ("hermes", '<tool_call>{"arguments": {"city": "Zürich"}, "name": "get_weather"}</tool_call>'),
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": "{\\"city\\": \\"Zürich\\"}"}'),
    ("hermes", '<tool_call>{"name":"get_weather","arguments":{"city":"Zürich"}}'),
    ("hermes", '<tool_call>[{"name": "get_weather", "arguments": {"city": "Zürich"}, "id": 1}]</tool_call>'),
    ("hermes", '<tool_call>{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich"}}}'),
    ("llama3", '{"name": "get_weather", "parameters": {"city": "Zürich"}}'),
    ("llama3", '\n{"type": "function", "name": "get_weather", "parameters": {"city": "Zürich"}}'),
    ("llama3", '{"function": "get_weather", "parameters": {"city": "Zürich"}}'),
    ("generic", '{"name": "get_weather", "arguments": {"city": "Zürich"}}'),
    ("generic", '```tool_code\n[{"name": "get_weather", "arguments": {"city": "Zürich"}}]\n```'),
    ("qwen3-coder", "<function=get_weather><parameter=city>Zürich</parameter></function></tool_call>"),
    ("qwen3-coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nZürich\n</parameter>\n"),
    ("mistral", '[TOOL_CALLS]get_weather [ARGS] {"city": "Zürich"}'),
    ("deepseek-v3.1", '<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Zürich"}'),
    ("gpt-oss", ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Zürich"}'),
    ("functiongemma", "<start_function_call>call:get_weather{ city: Zürich }<end_function_call>"),
]


@pytest.mark.parametrize(("name", "answer"), OTHER_FORMS)
def test_other_forms_of_calls(name: str, answer: str) -> None:
    parts = split(form(name), [answer])
    assert calls_of(parts) == CALLS[:1]
    assert [kind for kind, _ in parts] == ["call", "arguments"]
    assert split(form(name), answer) == parts


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("hermes", '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>'),
        ("hermes", "<tool_call>\n{'name': 'get_weather', 'arguments': {}}\n</tool_call>"),
        ("hermes", '<tool_call>{"name": "get_weather", "argum'),
        ("hermes", '<tool_call>{"id": 5, "name": ["get_weather"]}</tool_call>'),
        ("hermes", 'Write <tool_call> and {"name": "get_weather", "arguments": {}}.'),
        ("hermes", "  Two words <tool_c and spaces \n"),
        ("llama3", '{"name": "Bob", "age": 3}'),
        ("llama3", '{"answer": {"name": "get_weather", "parameters": {}}}'),
        ("llama3", 'Yes: {"name": "get_weather", "parameters": {}}'),
        ("generic", "```json\n[1, 2]\n```\n"),
        ("mistral", "[TOOL_CALLS]unknown[ARGS]{}"),
        ("qwen3-coder", "<function=unknown>\n<parameter=a>\n1\n</parameter>\n</function>"),
        ("functiongemma", "<start_function_call>call:unknown{}<end_function_call>"),
        ("gpt-oss", "No channel < at all."),
    ],
)
def test_what_only_looks_like_a_call_is_text(name: str, answer: str) -> None:
    assert split(form(name), [answer]) == split(form(name), answer) == [("text", answer)]
    assert split(form(name), answer, tools=None) == [("text", answer)]


def test_text_around_calls_and_calls_without_arguments() -> None:
    call = '<tool_call>\n{"name": "now"}\n</tool_call>'
    assert split(form("hermes"), f"A {call}\n\n {call} B <b>\n") == [
        ("text", "A"), ("call", "now"), ("arguments", "{}"), ("call", "now"), ("arguments", "{}"), ("text", "B <b>\n"),
    ]  # fmt: skip
    for name, answer in (
        ("qwen3-coder", "<tool_call>\n<function=now>\n</function>\n</tool_call>"),
        ("glm", "<tool_call>now\n</tool_call>"),
        ("gemma4", "<|tool_call>call:now{}<tool_call|>"),
        ("gpt-oss", "<|channel|>commentary to=functions.now<|message|><|call|>"),
        ("mistral", "[TOOL_CALLS]now[ARGS]{}"),
    ):
        assert split(form(name), answer) == [("call", "now"), ("arguments", "{}")]


def test_arguments_that_are_no_json_are_passed_on() -> None:
    answer = '<tool_call>\n{"name": "now", "arguments": {"a": 1,, "b": nothing}}\n</tool_call> So.'
    parts = [("call", "now"), ("arguments", '{"a": 1,, "b": nothing}'), ("text", "So.")]
    assert split(form("hermes"), answer) == parts


def test_text_values_keep_their_lines() -> None:
    answer = "<function=get_weather>\n<parameter=city>\n\n  a <b>\n</param\n\n</parameter>\n</function>"
    assert calls_of(split(form("qwen3-coder"), answer)) == [("get_weather", {"city": "\n  a <b>\n</param\n"})]
    assert calls_of(split(form("qwen3-coder"), answer.replace("city", "new"))) == [
        ("get_weather", {"new": "\n  a <b>\n</param\n"})
    ]


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "integer"}, 5), ("5", {"type": "string"}, "5"), ("5", {}, 5), ("5", None, 5), ("5", True, 5),
        ("5", {"type": "number"}, 5), ("5.5", {"type": "integer"}, "5.5"), (" 5\n", {"type": "integer"}, 5),
        ("null", {"type": ["string", "null"]}, None), ("nil", {"anyOf": [{"type": "string"}, {"type": "null"}]}, "nil"),
        ("True", {"type": "boolean"}, True), ("None", {}, None), ("('a', 1)", {"type": "array"}, ["a", 1]),
        ("{'a': 1}", {"type": "object"}, {"a": 1}), ("NaN", {"type": "number"}, "NaN"), ("{1}", {}, "{1}"),
        ("5", {"enum": ["5", "6"]}, "5"), ("6", {"enum": [5, 6]}, 6), ("true", {"const": True}, True),
        ("[" * 9999, {"type": "array"}, "[" * 9999), ("9" * 9999, {"type": "integer"}, "9" * 9999),
        ("5", {"type": 7, "enum": 3, "anyOf": {"a": 1}, "oneOf": [None]}, 5), ("", {}, ""), ('"a"', {}, '"a"'),
    ],
)  # fmt: skip
def test_values_that_are_text(text: str, schema: Any, value: Any) -> None:
    found = json.loads(value_json(text, types_of(schema)))
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize("tag", TAGS)
def test_reasoning(tag: str) -> None:
    end = TAGS[tag]
    for one in (GENERIC, FORMS[-2]):
        for prompt, answer in (("", f" {tag}\nA {tag} B\n{end}\n\n C\n"), (f"x{tag}\n", f"A {tag} B\n{end}\n\n C\n")):
            expected = [("reasoning", f"A {tag} B"), ("text", "C\n")]
            for i in range(len(answer)):
                for tools in (None, TOOLS):
                    assert split(one, [answer[:i], answer[i:]], prompt, tools) == expected
        assert split(one, f"{tag} A", "") == [("reasoning", "A")]
        assert split(one, f"A {tag} B {end} C") == [("text", f"A {tag} B {end} C")]
        assert split(one, f"{tag}{end}C") == split(one, f"{end}C", tag) == [("text", "C")]
        assert split(one, "C", f"{tag}\n\n{end}\n\n") == [("text", "C")]


FRAGMENTS = [*TAGS, *TAGS.values(), *"<>[]{}:,\"'\\\n ", "a", "é", "```json", "name", "get_weather", "arguments", "{}"]
FRAGMENTS += sorted({mark for one in FORMS for text in (one.begin, one.head, one.tail, one.end, one.key, one.close)
                     for mark in re.findall(r"<[^<>$]*>?|\[[A-Z_]+\]|\w+:", text)})  # fmt: skip
PIECES = st.lists(st.sampled_from(FRAGMENTS), max_size=30)
FORM = st.sampled_from([*FORMS, GENERIC])


@settings(max_examples=300, deadline=None)
@given(FORM, PIECES)
def test_no_character_is_lost_where_nothing_is_called(form: Form, pieces: list[str]) -> None:
    text = "".join(pieces)
    begins_reasoning = text.lstrip().startswith(tuple(TAGS))
    for tools in (None, [{"function": {"name": "unheard"}}]):
        if form.name != "gpt-oss" or not re.search(r"to=|<\||<$", text):
            parts = split(form, pieces, tools=tools)
            assert parts == split(form, text, tools=tools)
            assert begins_reasoning or "".join(part for _, part in parts) == text


@settings(max_examples=300, deadline=None)
@given(FORM, st.lists(st.sampled_from(FRAGMENTS) | st.sampled_from([*ANSWERS.values()]), max_size=8))
def test_the_cuts_of_a_text_never_matter(form: Form, pieces: list[str]) -> None:
    assert split(form, pieces) == split(form, "".join(pieces)) == split(form, ["".join(pieces)])


def test_long_texts_take_no_longer_than_they_are() -> None:
    """Each of these takes hours if a pattern goes back and forth in it."""
    opened = '<tool_call>{"id":'
    bombs = [" \n" * 20_000 + "x", opened * 3000, opened * 3000 + "}" * 3000, "<tool_call>" + "\n" * 20_000 + "x"]
    bombs += [
        "<function=now><parameter=a>" * 2000,
        "<" * 20_000,
        '{"name": "now", "arguments": {"a": "' + '\\"' * 20_000,
    ]
    for one in (*FORMS, GENERIC):
        for bomb in bombs:
            assert len(split(one, [bomb])) < 5 or one.key


def test_families_by_their_templates() -> None:
    assert family_of(None).name == family_of("{{ messages }}").name == "generic"
    for one in FORMS:
        family = family_of(" ".join(one.marks))
        assert (family.name, family.shows_special) == (one.name, one.has_special)
    assert family_of("<tool_call> {% if enable_thinking %}<think>").tag == "<think>"


USER = {"role": "user", "content": "Hi"}
# The calls of an assistant's message, in the words of Qwen's and Llama's templates.
TEMPLATES = {
    "hermes": '<tool_call>\n{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}\n</tool_call>\n',
    "qwen3-coder": "<tool_call>\n<function={{ c.name }}>\n{% for k, v in c.arguments.items() %}<parameter={{ k }}>\n"
    "{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>\n",
    "llama3": '{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}};\n',
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_round_trip(name: str) -> None:
    template = "{% for m in messages %}{% for c in m.tool_calls or [] %}{% set c = c.function %}" + TEMPLATES[name]
    template += "{% endfor %}{% endfor %}"
    functions = [{"name": name, "arguments": json.dumps(arguments)} for name, arguments in CALLS]
    message = {"role": "assistant", "tool_calls": [{"function": function} for function in functions]}
    text = render_chat(template, [USER, message], bos_token=None, eos_token=None)
    assert calls_of(split(form(name), [text])) == CALLS
    # Arguments that are no object are shown, also by a template that asks for the items of one.
    functions[0]["arguments"] = '{"city": "Zür'
    assert "Zür" in render_chat(template, [USER, message], bos_token=None, eos_token=None)


def test_round_trip_of_published_templates() -> None:
    """Those that benchmarks/chat_templates.py has kept: the call of the history is read back from what is written."""
    files = sorted(FOLDER.glob("*.jinja"))
    if not files:
        pytest.skip(f"no templates in {FOLDER}: see benchmarks/chat_templates.py")
    function = {"name": CALLS[0][0], "arguments": CALLS[0][1]}
    call = {"id": "call12345", "type": "function", "function": function}
    message, process, n_read = {"role": "assistant", "content": "", "tool_calls": [call]}, TemplateProcess(), 0
    for file in files:
        template = file.read_text()
        one = family_of(template).form
        try:
            texts = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": False}
            with warnings.catch_warnings(category=UserWarning, action="ignore"):
                before, after = (
                    render_chat(template, [USER, message][:n], tools=TOOLS, process=process, **texts) for n in (1, 2)
                )
        except GgufRunError:  # some refuse messages of this kind
            continue
        if one is not GENERIC and "Zürich" in after:
            n_read += calls_of(split(one, [after[len(before) :].removeprefix("<|turn>model\n")])) == CALLS[:1]
    assert n_read >= 30
