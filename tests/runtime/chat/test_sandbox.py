"""What a template makes of messages, and messages that are fitted to templates without a place for a part of them."""

import re
from itertools import pairwise
from typing import Any

import pytest

from gguf_run.runtime.chat.sandbox import NO_CALLS, NO_LATER_SYSTEM, NO_SYSTEM, NO_TOOLS, render

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call12345", "type": "function", "function": {"name": "w", "arguments": {"c": "é"}}}],
}
RESULT = {"role": "tool", "content": "20", "tool_call_id": "call12345"}
TOOLS = [{"type": "function", "function": {"name": "w"}}]


def rendered(source: str, *messages: dict[str, Any], **variables: Any) -> tuple[str, list[str]]:
    reply = render(source, {"messages": list(messages), "tools": None} | variables)
    return reply.get("text", reply.get("error")), reply.get("notes", [])


ALL = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
IGNORES = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + ALL
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles') }}"
    "{% endif %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
)


@pytest.mark.parametrize("source", [IGNORES, REFUSES, ALTERNATES])
def test_a_system_message_without_a_place_begins_the_users(source: str) -> None:
    assert rendered(source, SYSTEM, USER) == ("<user>Be brief.\nHi", [NO_SYSTEM])
    assert rendered(source, SYSTEM, USER, ANSWER, USER) == ("<user>Be brief.\nHi<assistant>Hello<user>Hi", [NO_SYSTEM])
    assert rendered(source, SYSTEM) == ("<user>Be brief.", [NO_SYSTEM])
    later = rendered(source, USER, ANSWER, SYSTEM, USER)
    assert later == ("<user>Hi<assistant>Hello<user>Be brief.\nHi", [NO_SYSTEM])
    assert rendered(source, USER) == ("<user>Hi", [])
    assert rendered(source, SYSTEM | {"content": ""}, USER)[0] == "<user>Hi"


def test_a_system_message_with_a_place_stays() -> None:
    assert rendered(ALL, SYSTEM, USER) == ("<system>Be brief.<user>Hi", [])
    trimmed = "{{ messages[0].content | trim | upper | lower }}{{ messages[1].content }}"
    assert rendered(trimmed, SYSTEM, USER) == ("be brief.Hi", [])
    with_tools = "{% for t in tools %}{{ t.function.name }}{% endfor %}" + ALL  # fails without tools
    assert rendered(with_tools, SYSTEM, USER, tools=TOOLS) == ("w<system>Be brief.<user>Hi", [])


FIRST_ONLY = "{% if messages[0].role == 'system' %}S:{{ messages[0].content }}{% endif %}" + IGNORES


def test_a_later_system_message_is_not_lost() -> None:
    second = {"role": "system", "content": "Be kind."}
    assert rendered(FIRST_ONLY, SYSTEM, USER) == ("S:Be brief.<user>Hi", [])
    assert rendered(FIRST_ONLY, SYSTEM, second, USER) == ("S:Be brief.<user>Be kind.\nHi", [NO_LATER_SYSTEM])
    assert rendered(FIRST_ONLY, USER, ANSWER, SYSTEM, USER) == (
        "<user>Hi<assistant>Hello<user>Be brief.\nHi", [NO_LATER_SYSTEM]
    )  # fmt: skip
    assert rendered(FIRST_ONLY, USER, SYSTEM) == ("<user>Hi\nBe brief.", [NO_LATER_SYSTEM])
    assert rendered(ALTERNATES, USER, SYSTEM) == ("<user>Hi\nBe brief.", [NO_SYSTEM])
    assert rendered(ALL, USER, ANSWER, SYSTEM, USER)[1] == []


@pytest.mark.parametrize("source", [ALL, FIRST_ONLY, IGNORES])
def test_a_later_system_message_stays_in_its_place(source: str) -> None:
    """What has been said is the beginning of what is said next, as Claude Code goes on: else no cache would know it."""
    talk = [SYSTEM, USER, SYSTEM | {"content": "Be kind."}, CALL, RESULT, SYSTEM, CALL, RESULT, ANSWER, SYSTEM, USER]
    texts = [rendered(source, *talk[:n])[0] for n in range(2, len(talk) + 1)]
    assert all(after.startswith(before) for before, after in pairwise(texts))
    assert texts[-1].count("Be") == 4
    assert "Be kind." in texts[1]


STRICT = (  # as Mistral's
    "{% set found = namespace(n=0) %}{% for m in messages %}{% if m.role == 'user' %}{% if found.n % 2 %}"
    "{{ raise_exception('Roles') }}{% endif %}{% set found.n = found.n + 1 %}{% elif m.tool_calls is defined %}"
    "{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('Ids') }}{% endif %}<{{ c.id }}>"
    "{{ c.function.arguments | tojson }}{% endfor %}{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}"
    "{{ raise_exception('Ids') }}{% endif %}={{ m.tool_call_id }}:{% else %}{% set found.n = found.n + 1 %}{% endif %}"
    "{{ m.content }}{% endfor %}"
)


def test_results_for_a_strict_template() -> None:
    """Ids that clients send back are longer than Mistral's, and Claude Code writes reminders behind results."""
    ids = "toolu_1234567890", "call_abc"
    calls = CALL | {"tool_calls": [CALL["tool_calls"][0] | {"id": id} for id in ids]}
    results = [RESULT | {"tool_call_id": id} for id in ids]
    text, _ = rendered(STRICT, USER, calls, *results, USER, calls, *results, ANSWER, USER)
    a, b = re.findall("<(.{9})>", text)[:2]
    once = f'<{a}>{{"c": "é"}}<{b}>{{"c": "é"}}={a}:20={b}:20'
    assert (text, a != b) == (f"Hi{once}\nHi{once}HelloHi", True)
    free = STRICT.replace("!= 9", "== 0")
    assert "toolu_1234567890" in rendered(free, USER, calls, *results)[0]


PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endfor %}"
)


def test_content_in_parts_for_templates_that_show_nothing_else() -> None:
    assert rendered(PARTS, SYSTEM, USER) == ("<system>Be brief.<user>Hi", [])
    both = PARTS.replace("{% for part", "{% if m.content is string %}{{ m.content }}!{% else %}{% for part", 1)
    both = both.replace("{% endfor %}{% endfor %}", "{% endfor %}{% endif %}{% endfor %}")
    assert rendered(both, USER) == ("<user>Hi!", [])
    without_system = PARTS.replace("<{{", "{% if m.role == 'system' %}{{ raise_exception('No') }}{% endif %}<{{", 1)
    assert rendered(without_system, SYSTEM, USER) == ("<user>Be brief.\nHi", [NO_SYSTEM])


def test_a_refusal_that_has_another_cause_is_told() -> None:
    assert rendered("{{ raise_exception('never') }}", SYSTEM, USER) == (": never", [])
    assert rendered(ALTERNATES, SYSTEM, USER, USER) == (": Roles", [])


def test_developer_is_a_new_name_of_system() -> None:
    developer = SYSTEM | {"role": "developer"}
    assert rendered(ALL, developer, USER) == ("<system>Be brief.<user>Hi", [])
    assert rendered(IGNORES, developer, USER) == ("<user>Be brief.\nHi", [NO_SYSTEM])
    assert rendered(ALL + "{# developer #}", developer, USER) == ("<developer>Be brief.<user>Hi", [])


@pytest.mark.parametrize(
    ("of_call", "expected"),
    [
        ("{{ f.arguments | tojson }}", '{"c": "é"}'),  # Qwen2.5: a string would be escaped twice
        ("{% for k, v in f.arguments | items %}<{{ k }}>{{ v }}{% endfor %}", "<c>é"),  # Qwen3-Coder: a string fails
        ("{% for k, v in f.arguments.items() %}<{{ k }}>{{ v }}{% endfor %}", "<c>é"),
        ("{{ '```json\n' + f.arguments + '\n```' }}", '```json\n{"c": "é"}\n```'),  # Functionary: an object fails
        ("{{ f.arguments }}", '{"c": "é"}'),  # an object would be written as Python writes it
        ("{{ f.arguments if f.arguments is string else f.arguments | tojson }}", '{"c": "é"}'),
    ],
)
def test_arguments_of_calls(of_call: str, expected: str) -> None:
    each = "{% for m in messages %}{% for c in m.tool_calls %}{% set f = c.function %}" + of_call
    source = each + "{% endfor %}{{ m.content }}{% endfor %}"
    assert rendered(source, USER, CALL, RESULT) == (f"Hi{expected}20", [])


def test_calls_that_a_template_shows_where_content_is_null() -> None:
    """DeepSeek-R1's distilled models."""
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}"
        "{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments }}{% endfor %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert rendered(source, USER, CALL, RESULT) == ('Hiw{"c": "é"}20', [])
    assert rendered(source, USER, CALL | {"content": "x"}, RESULT) == ("Hix20", [])


def test_null_is_not_written_as_none() -> None:
    source = "{% for m in messages %}{{ m.content }}{{ m.tool_calls[0].function | tojson if m.tool_calls }}{% endfor %}"
    assert "None" not in rendered(source, USER, CALL)[0]


def test_what_has_no_place_is_said() -> None:
    assert rendered(ALL, USER, tools=TOOLS) == ("<user>Hi", [NO_TOOLS])
    assert rendered(ALL, USER, CALL, RESULT) == ("<user>Hi<assistant><tool>20", [NO_CALLS])
    assert rendered(ALL, SYSTEM, USER, ANSWER) == ("<system>Be brief.<user>Hi<assistant>Hello", [])
    source = "{% if tools %}{{ tools | tojson }}{% endif %}" + ALL
    assert rendered(source, USER, tools=TOOLS)[1] == []
    only_names = "{% if tools is not none %}{{ tools[0].function.name }}{% endif %}" + ALL
    assert rendered(only_names, USER, tools=TOOLS) == ("w<user>Hi", [])


def test_the_time_is_that_of_the_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process and its compiled templates live on for days."""
    from gguf_run.runtime.chat import sandbox

    now = rendered("{{ strftime_now('%Y-%m-%d') }}")[0]
    assert len(now) == 10
    real = sandbox.datetime

    class Later(real):  # type: ignore[misc, valid-type]
        @classmethod
        def now(cls) -> Any:
            return real(2099, 1, 2)

    monkeypatch.setattr(sandbox, "datetime", Later)
    assert rendered("{{ strftime_now('%Y-%m-%d') }}")[0] == "2099-01-02"
