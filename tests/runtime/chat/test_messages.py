"""All forms of messages that callers have become one, and errors name the place."""

from collections import UserDict
from typing import Any

import pytest

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.chat.messages import objects, plain, uniform


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}]} | more  # fmt: skip # noqa: E501


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Hi", [{"role": "user", "content": "Hi"}]),
        ([], []),
        (({"role": "user", "content": "a"},), [{"role": "user", "content": "a"}]),
        ([UserDict(role="user", content="a")], [{"role": "user", "content": "a"}]),
        ([{"role": "assistant"}], [{"role": "assistant", "content": ""}]),
        ([{"role": "assistant", "content": None}], [{"role": "assistant", "content": ""}]),
        ([{"role": "user", "content": []}], [{"role": "user", "content": ""}]),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}]}],
         [{"role": "user", "content": "a\nb "}]),
        # What OpenAI's client makes of an answer.
        ([{"role": "assistant", "content": "a", "refusal": None, "audio": None, "tool_calls": None}],
         [{"role": "assistant", "content": "a"}]),
        ([{"role": "assistant", "content": "a", "tool_calls": []}], [{"role": "assistant", "content": "a"}]),
        ([{"role": "tool", "name": "f", "tool_call_id": "1", "content": "b"}],
         [{"role": "tool", "name": "f", "tool_call_id": "1", "content": "b"}]),
        ([{"role": "assistant", "content": "a", "reasoning_content": "r", "other": {"x": (1, 2.5, True)}}],
         [{"role": "assistant", "content": "a", "reasoning_content": "r", "other": {"x": [1, 2.5, True]}}]),
        ([call('{"city": "Zürich"}', content=None)], [call({"city": "Zürich"}, content="")]),
        ([call({"city": [1]}, content="x")], [call({"city": [1]}, content="x")]),
        ([call("")], [call({}, content="")]),
        ([call("null")], [call({}, content="")]),
        ([call(None)], [call({}, content="")]),
        # What models write, and clients send back: no object.
        *(([call(text)], [call(text, content="")]) for text in ("{", "Paris", "[1]", '"{}"', "[" * 100_000)),
        ([{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f"}}]}],
         [{"role": "assistant", "content": "",
           "tool_calls": [{"type": "function", "id": "1", "function": {"name": "f", "arguments": {}}}]}]),
        # The first API for calls.
        ([{"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
          {"role": "function", "name": "f", "content": "3"}],
         [call({"a": 1}, content=""), {"role": "tool", "name": "f", "content": "3"}]),
        ([{"role": "assistant", "tool_calls": [{"id": None, "type": None, "function": {"name": "f"}}]}],
         [call({}, content="")]),
        ([{"role": "assistant", "content": None, "refusal": "No."}], [{"role": "assistant", "content": "No."}]),
        ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}],
         [{"role": "assistant", "content": "No."}]),
        ([{"role": "user", "content": [{"type": "input_text", "text": "a"}]}], [{"role": "user", "content": "a"}]),
    ],
)  # fmt: skip
def test_uniform(given: Any, expected: list[dict[str, Any]]) -> None:
    found = uniform(given)
    assert found == expected
    assert uniform(found) == expected


def test_the_caller_keeps_its_messages() -> None:
    given = [call('{"a": 1}', content=None)]
    uniform(given)
    assert given == [call('{"a": 1}', content=None)]


U = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "messages is missing; allowed: a list of objects"),
        (U, "messages is an object; allowed: a list of objects"),
        (b"Hi", "messages is of Python's type bytes; allowed: what JSON can hold"),
        (5, "messages is a number; allowed: a list"),
        (iter([U]), "messages is of Python's type list_iterator"),
        ([U, "Hi"], "messages[1] is a string; allowed: an object"),
        ([U, None], "messages[1] is missing; allowed: an object"),
        ([U, [U]], "messages[1] is a list; allowed: an object"),
        ([{"content": "a"}], "messages[0].role is missing; allowed: a string"),
        ([{"role": None}], "messages[0].role is missing"),
        ([{"role": 1}], "messages[0].role is a number"),
        ([U, {"role": "user", "content": 5}], "messages[1].content is a number; allowed: a string, or a list of {"),
        ([{"role": "tool", "content": {"t": 20}}], "messages[0].content is an object; allowed: a string, or a list"),
        ([{"role": "user", "content": True}], "messages[0].content is a boolean"),
        ([{"role": "assistant", "function_call": "f"}], "messages[0].function_call is a string; allowed: an object"),
        ([{"role": "assistant", "refusal": 5}], "messages[0].refusal is a number; allowed: a string"),
        ([{"role": "user", "content": [{"type": {}}]}], 'messages[0].content[0].type is {}; allowed: "text"'),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0] is a string; allowed: an object, as {"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}],
         'messages[0].content[1].type is "image_url"; allowed: "text"'),
        ([{"role": "tool", "content": [{"type": "film"}]}], 'messages[0].content[0].type is "film"'),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], 'messages[0].content[0].type is "input_audio"'),
        ([{"role": "user", "content": [{"text": "a"}]}], "messages[0].content[0].type is null"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text is missing; allowed: a str"),
        ([{"role": "user", "content": [{"type": "text", "text": ["a"]}]}], "messages[0].content[0].text is a list"),
        ([U | {"name": 3}], "messages[0].name is a number; allowed: a string"),
        ([U | {"tool_call_id": {}}], "messages[0].tool_call_id is an object"),
        ([U | {"reasoning_content": []}], "messages[0].reasoning_content is a list"),
        ([U | {"tool_calls": {}}], "messages[0].tool_calls is an object; allowed: a list"),
        ([U | {"tool_calls": "f()"}], "messages[0].tool_calls is a string"),
        ([U | {"tool_calls": ["f"]}], "messages[0].tool_calls[0] is a string; allowed: an object, as {"),
        ([U | {"tool_calls": [{"name": "f", "arguments": {}}]}], "messages[0].tool_calls[0].function is missing"),
        ([U | {"tool_calls": [{"function": {"arguments": {}}}]}], "messages[0].tool_calls[0].function.name is missing"),
        ([call([])], "messages[0].tool_calls[0].function.arguments is a list"),
        ([call([1])], "messages[0].tool_calls[0].function.arguments is a list"),
        ([call({"when": {1, 2}})], "messages[0].tool_calls[0].function.arguments.when is of Python's type set"),
        ([U | {3: "x"}], "a name in messages[0] is a number; allowed: a string"),
        ([U | {"x\ny": object()}], "messages[0].x y is of Python's type object"),
    ],
)  # fmt: skip
def test_errors_name_the_place(given: Any, message: str) -> None:
    with pytest.raises(GgufRunError) as caught:
        uniform(given)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_tools_and_options() -> None:
    assert objects(({"a": ("b", None)},), "tools") == [{"a": ["b", None]}]
    assert plain({"a": [{"b": 1.5}]}, "options") == {"a": [{"b": 1.5}]}
    with pytest.raises(GgufRunError, match=r"^tools\[1\] is of Python's type function; allowed: what JSON can hold"):
        objects([{}, lambda: 1], "tools")
    with pytest.raises(GgufRunError, match=r"^tools is a string; allowed: a list of objects$"):
        objects("f", "tools")
    with pytest.raises(GgufRunError, match=r"^options\.a\[0\] is of Python's type object"):
        plain({"a": [object()]}, "options")
