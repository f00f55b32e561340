"""Templates of published models against transformers, and the named ones against what llama.cpp makes of the names."""

import os
from pathlib import Path

import pytest
import real
from chat_templates import CASES, FOLDER, differences

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.chat.named import TEMPLATES, find_template
from gguf_run.runtime.chat.template import MAX_TEMPLATE, render_chat
from gguf_run.runtime.load.load_model import chat_template

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}

# As models with tools have them: JSON of the functions, of the calls and their arguments; results in a role of their
# own; thoughts of former turns left out.
WITH_TOOLS = """\
{%- macro call(f) %}<tool_call>{{ {"name": f.name, "arguments": f.arguments} | tojson }}</tool_call>{% endmacro %}
{{- bos_token }}
{%- if tools %}
    {{- "Tools:\n" }}
    {%- for tool in tools %}{{ tool | tojson(indent=4) }}{% if not loop.last %},{% endif %}{% endfor %}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
    {%- if m.role == "user" and m.content is string %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == "assistant" and "</think>" in m.content %}
        {%- set thought, content = m.content.split("</think>")[0], m.content.split("</think>")[-1].lstrip("\n") %}
        {{- "<a>" + (thought.rstrip() if loop.index0 > ns.last else "") + content + "</a>" }}
    {%- elif m.tool_calls is defined %}
        {%- for c in m.tool_calls %}{{ call(c.function) }}{% endfor %}
    {%- else %}
        {{- "<" ~ m.role[0] ~ ">" ~ (m.content | trim | e) ~ "</" ~ m["role"][:1] ~ ">" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<a>\n" }}{% endif %}
"""
TESTED = """\
{{ tools | map(attribute="function") | map(attribute="name") | join(",") if tools else "none" }}
{% for k, v in messages[0].items() | sort %}{{ k }}={{ v | string | upper | replace("H", "_") }};{% endfor %}
{{ messages | selectattr("role", "equalto", "user") | list | length }} {{ messages | length is divisibleby 2 }}
{{ messages[-1]["content"][::-1] }}
{{ "%s:%05.1f" | format("x", 2.5) }} {{ [3, 1, 2] | sort | first }} {{ none is none }}
{%- set x = messages[1:] | groupby("role") %}{% for role, all in x %} {{ role }}{{ all | length }}{% endfor %}
{% if messages[0].get("missing") is none and messages[0].name is not defined %}ok{% endif %}{{- "é\\"" | tojson -}}
{% for m in messages recursive %}
{{ loop.cycle("a", "b") }}{% if loop.first %}{% continue %}{% endif %}{{ m.role[0] }}{% endfor %}
"""


@pytest.mark.parametrize("template", [WITH_TOOLS, TESTED], ids=["with tools", "filters and tests"])
def test_as_transformers(template: str) -> None:
    pytest.importorskip("transformers")
    n_rendered, wrong = differences(template)
    assert (n_rendered, wrong) == (2 * len(CASES), [])


def test_templates_of_published_models() -> None:
    """Those that benchmarks/chat_templates.py has kept."""
    pytest.importorskip("transformers")
    files = sorted(FOLDER.glob("*.jinja"))
    if not files:
        pytest.skip(f"no templates in {FOLDER}: see benchmarks/chat_templates.py")
    results = {file.stem: differences(file.read_text(), ["system, turns", "call"]) for file in files[:34]}
    assert {name: wrong for name, (_, wrong) in results.items() if wrong} == {}
    assert sum(n_rendered > 0 for n_rendered, _ in results.values()) >= min(30, len(files))


@pytest.mark.parametrize("model", [real.smollm2, real.gemma3])
def test_templates_of_real_files(model: object) -> None:
    pytest.importorskip("transformers")
    with GGUFFile.open(model()) as file:  # type: ignore[operator]
        template = chat_template(file.metadata)
    if template is not None:
        n_rendered, wrong = differences(template)
        assert n_rendered >= 4
        assert wrong == []


# Made with llama_chat_apply_template of llama.cpp 0.5.0.
NAMED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello"
    "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n<|user|>\nHi<|end|>\n"
    "<|assistant|>\n",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n<|user|>\nHi</s>\n"
    "<|assistant|>\n",
    "vicuna": "Be brief.\n\nUSER: Hi\nASSISTANT: Hello</s>\nUSER: Hi\nASSISTANT:",
}


def test_named_templates() -> None:
    messages = [SYSTEM, USER, ANSWER, USER]
    for name, text in TEMPLATES.items():
        assert render_chat(text, messages, bos_token="<s>", eos_token="</s>") == NAMED[name]
        assert "Be" not in render_chat(text, [USER], bos_token="<s>", eos_token="</s>")


def test_find_template(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("\ufeff{{ messages[0].content }}é", "utf-8")
    assert find_template(str(path)) == "{{ messages[0].content }}é"
    assert find_template("chatml") == TEMPLATES["chatml"]
    with pytest.raises(GgufRunError, match=r"--chat-template chatm: neither a file nor one of chatml, .*vicuna"):
        find_template("chatm")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(GgufRunError, match=r"mine\.jinja: not UTF-8"):
        find_template(str(path))
    path.write_bytes(b"x" * (5 * MAX_TEMPLATE))
    with pytest.raises(GgufRunError, match=r"mine\.jinja: is larger than \d+ bytes"):
        find_template(str(path))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12\n")
    with pytest.raises(GgufRunError, match=r"mine\.jinja: is a Git LFS pointer"):
        find_template(str(path))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        for device in (str(tmp_path / "pipe"), "/dev/zero"):
            with pytest.raises(GgufRunError, match="is a device or pipe"):
                find_template(device)
    with pytest.raises(GgufRunError, match=r"it has \d+ characters"):
        render_chat("x" * (MAX_TEMPLATE + 1), [USER], bos_token=None, eos_token=None)
