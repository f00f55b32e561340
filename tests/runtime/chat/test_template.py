"""Chat templates: what they make of messages, and templates that mean harm."""

from typing import Any

import pytest
import real

from gguf_run.formats.errors import FormatError, GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.chat import template as template_module
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


def render(template: str, *messages: dict[str, Any], **options: Any) -> str:
    return render_chat(template, messages or [USER], **({"bos_token": "<s>", "eos_token": "</s>"} | options))


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


HOSTILE = [
    ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
    ("{{ cycler.__init__.__globals__ }}", "access to attribute '__init__' of 'type' object is unsafe"),
    ("{{ (''|attr('__class__')).x }}", "is unsafe"),
    ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
    ("{{ messages[0].update(role='x') }}", "access to attribute 'update' of 'dict' object is unsafe"),
    ("{% include '/etc/passwd' %}", "no loader"),
    ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}xxxxx{% endfor %}{% endfor %}", "characters of text"),
    ("{% for i in range(99999) %}{{ messages | tojson }}{% endfor %}", "characters of text"),
    ("{% macro m() %}{{ 'a' * 200000 }}{% endmacro %}{{ m() | length }}", "characters of text"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "RecursionError"),
    ("{% set n = namespace(s=[]) %}{% for i in range(1200) %}{% set n.s = [n.s] %}{% endfor %}{{ n.s }}", "Recursion"),
    ("{{ 'a' * 10**6 }}", "characters of text"),
    ("{{ [1] * 10**6 }}", "characters of text"),
    ("{{ 'a'.ljust(10**6) }}", "characters of text"),
    ("{{ 'a' | center(1000000) }}", "characters of text"),
    ("{{ messages | tojson(indent=1000000) }}", "characters of text"),
    ("{{ '%999999d' % 1 }}", "characters of text"),
    ("x" * (MAX_TEMPLATE + 1), f"it has {MAX_TEMPLATE + 1} characters: {MAX_TEMPLATE} are allowed"),
    ("a\n{% if %}", "failed in line 2: Expected an expression"),
    ("{{ nothing.x }}", "'nothing' is undefined"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{{ raise_exception('a\nb') }}", "failed: a b$"),
]


@pytest.mark.parametrize(("template", "message"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_templates_end_with_one_line(template: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "MAX_CHARS", 100_000)
    with pytest.raises(GgufRunError, match=message) as caught:
        render(template)
    assert str(caught.value).startswith("the model's chat template failed")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


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
