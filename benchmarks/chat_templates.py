"""Checks that chat templates of published models render as transformers renders them, and keeps them for the tests.

    python benchmarks/chat_templates.py FOLDER | llama_cpp_python-0.3.36.tar.gz

The sdist of llama-cpp-python holds some 70 real templates (models/templates/*.jinja). They are other people's text, so
they are put into the cache folder, where tests/runtime/chat/test_named.py finds them.
"""

import sys
import tarfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf_run.formats.compiler.cachedir import user_cache_dir
from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.chat.process import TemplateProcess
from gguf_run.runtime.chat.sandbox import fitted
from gguf_run.runtime.chat.template import render_chat

FOLDER = user_cache_dir() / "chat-templates"
_CITY = {"type": "string", "description": 'A <city> & its "country", é'}
TOOLS = [
    {"type": "function", "function": {
        "name": "get_weather", "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": _CITY, "unit": {"type": "string", "enum": ["C", "F"]}},
                       "required": ["city"]}}},
]  # fmt: skip
_SYSTEM = {"role": "system", "content": "Be brief & <kind>."}
_USER = {"role": "user", "content": "  What is the weather in Zürich?\n"}
_ANSWER = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nSunny."}
_FUNCTION = {"name": "get_weather", "arguments": {"city": "Zürich"}}
_CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "call12345", "type": "function", "function": _FUNCTION}]}  # fmt: skip # noqa: E501
_RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call12345", "content": '{"t": 20}'}
CASES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "user": ([_USER], None),
    "system": ([_SYSTEM, _USER], None),
    "turns": ([_USER, _ANSWER, _USER], None),
    "system, turns": ([_SYSTEM, _USER, _ANSWER, _USER], None),
    "tools": ([_USER], TOOLS),
    "call": ([_USER, _CALL, _RESULT], TOOLS),
    "system, call, turns": ([_SYSTEM, _USER, _CALL, _RESULT, _ANSWER, _USER], TOOLS),
}


def differences(template: str, names: Sequence[str] = tuple(CASES)) -> tuple[int, list[str]]:
    """Return how many conversations transformers renders, and those that we render differently or not at all.

    transformers gets the messages in the form that we find right for the template, see fitted.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    n_rendered, wrong, process = 0, [], TemplateProcess()
    for name in names:
        messages, tools = CASES[name]
        for prompt in (True, False):
            options: dict[str, Any] = {
                "tools": tools,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "add_generation_prompt": prompt,
            }
            try:
                form = fitted(template, {"messages": messages, "documents": None, **options}, [])
                expected = render_jinja_template([form], chat_template=template, **options)[0][0]
                n_rendered += 1
            except Exception:  # many templates refuse tools, or roles
                expected = None
            try:
                with warnings.catch_warnings(category=UserWarning, action="ignore"):
                    found: str | None = render_chat(template, messages, process=process, **options)
            except GgufRunError:
                found = None
            if found != expected:
                wrong.append(f"{name}, add_generation_prompt={prompt}")
    return n_rendered, wrong


def _keep(source: Path) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        for file in source.glob("*.jinja"):
            (FOLDER / file.name).write_bytes(file.read_bytes())
        return
    with tarfile.open(source) as archive:
        for member in archive:
            if "/models/templates/" in member.name and member.name.endswith(".jinja"):
                (FOLDER / Path(member.name).name).write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    _keep(Path(sys.argv[1]))
    n_same = 0
    for file in sorted(FOLDER.glob("*.jinja")):
        n_rendered, wrong = differences(file.read_text())
        n_same += not wrong
        print(f"{file.stem:60} {n_rendered:3} rendered, {len(wrong)} differ {'; '.join(wrong)}")
    print(f"{n_same} templates render as in transformers")


if __name__ == "__main__":
    main()
