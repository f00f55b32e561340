"""Chat templates: what they make of messages, and what the sandbox forbids."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import real

from gguf_run.formats.errors import FormatError, GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.chat.process import TemplateProcess
from gguf_run.runtime.chat.sandbox import NO_SYSTEM, NO_TOOLS
from gguf_run.runtime.chat.template import MAX_TEMPLATE, render_chat
from gguf_run.runtime.load.load_model import chat_template
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

SYSTEM = {"role": "system", "content": "Be <brief>."}
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello é"}

# As of Llama 2, with BOS, a check of the roles and loop variables.
LLAMA2 = """\
{%- if messages[0]['role'] == 'system' %}{% set system, messages = messages[0]['content'], messages[1:] %}{% endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate:\nuser, assistant') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- bos_token + '[INST] ' + ('<<SYS>>' ~ system ~ '<</SYS>> ' if loop.first and system else '') }}
        {{- message.content.strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""


PROCESS = TemplateProcess()


@pytest.fixture(scope="module", autouse=True)
def _end() -> Iterator[None]:
    yield
    PROCESS.close()


def render(template: str, *messages: dict[str, Any], **options: Any) -> str:
    usual = {"bos_token": "<s>", "eos_token": "</s>", "process": PROCESS}
    return render_chat(template, messages or [USER], **(usual | options))


@pytest.mark.parametrize(
    ("template", "messages", "options", "expected"),
    [
        (LLAMA2, [USER], {}, "<s>[INST] Hi [/INST]"),
        (LLAMA2, [SYSTEM, USER, ANSWER, USER], {},
         "<s>[INST] <<SYS>>Be <brief>.<</SYS>> Hi [/INST] Hello é</s><s>[INST] Hi [/INST]"),
        ("{{ bos_token }}|{{ eos_token }}", [], {"bos_token": None, "eos_token": None}, "|"),
        ("{% if add_generation_prompt %}A{% endif %}", [], {}, "A"),
        ("{% if add_generation_prompt %}A{% endif %}", [], {"add_generation_prompt": False}, ""),
        ("{{ tools is none }} {{ documents is none }} {{ other is defined }}", [], {}, "True True False"),
        ("{{ tools | tojson }}", [], {"tools": [{"a": "<é>"}]}, '[{"a": "<é>"}]'),
        ("{{ tools | tojson(indent=1) }}", [], {"tools": [{"a": 1}]}, '[\n {\n  "a": 1\n }\n]'),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc\n", [], {}, "a\nb\nc"),  # trim_blocks, lstrip_blocks
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", [], {}, "01"),
        ("a{% generation %}b{{ messages[0].content }}{% endgeneration %}c", [USER], {}, "abHic"),
        ("{{ strftime_now('%Y') | length }}", [], {}, "4"),
        ("{{ enable_thinking }} {{ documents | length }} {{ messages | length }}", [USER],
         {"options": {"enable_thinking": False, "documents": ["a", "b"]}}, "False 2 1"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n ~ 'x' ~ none }}", [], {}, "2xNone"),
        ("{{ 7 % 4 }} {{ 2 ** 10 }} {{ 1.5 * 2 }} {{ 3 * 'b' }} {{ [1] + [2] }} {{ '%s-%d' % ('x', 3) }}", [], {},
         "3 1024 3.0 bbb [1, 2] x-3"),
        ("{{ '{:>5}'.format('a') }}{{ 'a,b'.split(',') | join('-') | replace('-', '--') }}", [], {}, "    aa--b"),
        ("{% set f = '{0.__class__}'.format %}[{{ f(messages) }}]", [], {}, "[]"),  # nothing comes out of the sandbox
    ],
)  # fmt: skip
def test_renders(template: str, messages: list[dict[str, Any]], options: dict[str, Any], expected: str) -> None:
    assert render(template, *messages, **options) == expected


REFUSED = [
    ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
    ("{{ cycler.__init__.__globals__ }}", "access to attribute '__init__' of 'type' object is unsafe"),
    ("{{ (''|attr('__class__')).x }}", "is unsafe"),
    ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
    ("{{ messages[0].update(role='x') }}", "access to attribute 'update' of 'dict' object is unsafe"),
    ("{% include '/etc/passwd' %}", "no loader"),
    ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "it is nested too deeply"),
    ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "it is nested too deeply"),
    ("{% set n = namespace(s=[]) %}{% for i in range(1200) %}{% set n.s = [n.s] %}{% endfor %}{{ n.s }}", "too deeply"),
    ("x" * (MAX_TEMPLATE + 1), f"it has {MAX_TEMPLATE + 1} characters: {MAX_TEMPLATE} are allowed"),
    ("a\n{% if %}", "failed in line 2: Expected an expression"),
    ("{{ nothing.x }}", "'nothing' is undefined"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{{ raise_exception('a\nb') }}", "failed: a b$"),
    ("{{ raise_exception(nothing) }}", "failed: TemplateError$"),
    ("{{ raise_exception(['x' * 10000000]) }}", r"failed: \['x{298}$"),
    ("{{ raise_exception(10 ** 5000) }}", "failed: ValueError: "),
    ("{{ raise_exception(messages) }}", r"failed: \[\{'role': 'user', 'content': 'Hi'\}\]$"),
    ("{% set n = namespace(s=[]) %}{% for i in range(1200) %}{% set n.s = [n.s] %}{% endfor %}"
     "{{ raise_exception(n.s) }}", "failed: TemplateError$"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "message"), REFUSED, ids=range(len(REFUSED)))
def test_failing_templates_end_with_one_line(template: str, message: str) -> None:
    with pytest.raises(GgufRunError, match=message) as caught:
        render(template)
    assert str(caught.value).startswith("the model's chat template failed")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_limits_are_told() -> None:
    """test_process.py has many more."""
    with pytest.raises(
        GgufRunError, match=r"chat template failed: it takes more than 256 MB of memory: choose another"
    ):
        render("{% set s='a'*1000000 %}{{ [[s]]*100000 }}")
    assert render("{{ messages[0].content }}") == "Hi"


def test_a_process_for_one_call() -> None:
    assert render("{{ messages[0].content }}", process=None) == "Hi"


def test_all_forms_of_messages_give_one_prompt() -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{% endfor %}"
    )
    expected = '<user>Hi\nthere<assistant>{"name": "w", "arguments": {"city": "Paris"}}'
    for content in ("Hi\nthere", [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]):
        for answer in ({"content": ""}, {"content": None}, {}):
            for arguments in ({"city": "Paris"}, '{"city": "Paris"}'):
                call = {"type": "function", "function": {"name": "w", "arguments": arguments}}
                messages = [{"role": "user", "content": content}, {"role": "assistant", "tool_calls": [call]} | answer]
                assert render(template, *messages) == expected
    assert render_chat(template, "Hi", bos_token=None, eos_token=None, process=PROCESS) == "<user>Hi"


def test_arguments_that_are_not_as_they_must_be() -> None:
    loop: list[Any] = []
    loop.append(loop)
    for options, message in (
        ({"tools": [len]}, r"^tools\[0\] is of Python's type builtin_function_or_method; allowed: what JSON can hold"),
        ({"tools": "f"}, "^tools is a string; allowed: a list of objects$"),
        ({"options": {"x": {1}}}, r"^template_options\.x is of Python's type set"),
        ({"options": {"x": loop}}, "template_options cannot be written as JSON: maximum recursion depth exceeded"),
        ({"options": {"x": 10**5000}}, "template_options cannot be written as JSON: Exceeds the limit"),
        ({"options": {"messages": [1]}}, r"^messages\[0\] is a number; allowed: an object$"),
    ):
        with pytest.raises(GgufRunError, match=message):
            render("x", **options)


def test_what_has_no_place_is_said_once() -> None:
    process = TemplateProcess()
    for n_warnings in (2, 0):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            shows_one = "{{ messages[0].content if messages | length == 1 }}"
            text = render(shows_one, SYSTEM, USER, tools=[{"a": 1}], process=process)
        assert text == "Be <brief>.\nHi"
        assert [str(warning.message) for warning in caught] == [NO_SYSTEM, NO_TOOLS][:n_warnings]


def test_roles_that_a_template_refuses() -> None:
    with pytest.raises(GgufRunError, match=r"failed: Roles must alternate: user, assistant$"):
        render(LLAMA2, USER, USER)


def test_a_long_conversation_stays_within_the_limits() -> None:
    prompt = render(LLAMA2, *[{"role": "user", "content": "x" * 10_000}, ANSWER] * 200)
    assert prompt.count("[INST]") == 200


def test_each_message_may_look_at_all_others() -> None:
    """As Gemma 4's template does."""
    template = (
        "{% for m in messages %}{% set n = namespace(k=0) %}{% for other in messages %}"
        "{% if other.role == m.role %}{% set n.k = n.k + 1 %}{% endif %}{% endfor %}{{ n.k }} {% endfor %}"
    )
    assert render(template, *[USER, ANSWER] * 10).split() == ["10"] * 20


def test_chat_template_of_a_file() -> None:
    assert chat_template({}) is None
    assert chat_template({"tokenizer.chat_template": ""}) is None
    assert chat_template({"tokenizer.chat_template": "x"}) == "x"
    with pytest.raises(FormatError, match=r"tokenizer.chat_template must be a string, but is int"):
        chat_template({"tokenizer.chat_template": 1})


def test_smollm2() -> None:
    with GGUFFile.open(real.smollm2()) as file:
        template = chat_template(file.metadata)
        tokenizer = Tokenizer.from_metadata(file.metadata)
    assert template is not None
    prompt = render(template, USER)
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode_chat(prompt)
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 3, 2)
