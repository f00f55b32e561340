"""How each family of models writes a call of a tool. A form is read by splitter.py and enforced by grammar.py."""

import re
from functools import cached_property

from gguf_run.formats.frozen import frozen

# Patterns never go back into white space (*+): a model may write a lot of it.
_WORDS = {"$name": r'\s*+(?P<name>[^\s"<>{}\[\]|]*)\s*+', "$key": r'(?P<key>[^<>"]*)', "$id": r'[^\s"<>{}\[\]|]*'}


@frozen
class Form:
    """The text of calls: begin, then head, arguments and tail of each call with `between` in between, then end.

    In texts, $name is the name of a tool, $key that of an argument, $id an id of the call, which nobody needs.
    """

    name: str
    marks: tuple[str, ...]  # a template with all of them has this form
    head: str
    tail: str = ""
    begin: str = ""
    end: str = ""
    between: str | None = ""  # None: an answer has one call
    key: str = ""  # written before the value of an argument, "" if the arguments are JSON
    close: str = ""  # written after it
    quote: str = ""  # written around strings, in the arguments of Gemma
    openers: tuple[str, ...] = ()  # not empty: the calls begin the answer, behind one of these
    has_special: bool = False  # control tokens are a part of it

    @property
    def has_objects(self) -> bool:
        """Each call is a JSON object, whose members may come in another order."""
        return self.head.startswith("{")

    @cached_property
    def triggers(self) -> tuple[str, ...]:
        """Texts that a call may begin with."""
        texts = [self.begin] if self.has_objects else [self.begin, self.head]
        return tuple(re.match(r"<[^<>\s$]+>|\[[A-Z_]+\]|[^\s$]+", text)[0] for text in texts if text)  # type: ignore[index]

    @cached_property
    def first(self) -> re.Pattern[str]:
        """What the first call begins with, up to its arguments."""
        return _pattern(self._before() + _atoms(self.head), self._then())

    @cached_property
    def next(self) -> re.Pattern[str]:
        """What a further call begins with."""
        return _pattern(r"(?:[,;]|\Z)?\s*+" + _atoms(self.head), self._then())

    @cached_property
    def object(self) -> re.Pattern[str]:
        """The first name in the object of a call."""
        return _pattern(rf'[,;]?\s*+{self._before()}{_atoms("{ ")}(?:"|\Z)(?P<key>[^"\\]*)', '"')

    @cached_property
    def argument(self) -> re.Pattern[str]:
        """What stands before the value of an argument, with one line break at most."""
        text = self.key.rstrip()
        then = r">\n|>(?=[^\n])" if self.key.endswith("\n") else ">"
        return _pattern(_atoms(text[:-1]), then, ">?")

    def _before(self) -> str:
        texts = self.openers or (self.begin.rstrip("[ "), "")
        return f"(?:{'|'.join(map(_atoms, texts))})" + (r"\s*+\[?\s*+" if self.has_objects else r"\s*+")

    def _then(self) -> str:
        return r"\s*+(?=<)" if self.key else r"\s*+(?=\{)"


def _atoms(text: str) -> str:
    """Return a pattern of a text that also matches its beginning, if the answer has not come further."""
    pieces = re.findall(r"\$(?:name|key|id)|\s+|.", text)
    return "".join(_WORDS.get(p) or (r"\s*+" if p.isspace() else rf"(?:{re.escape(p)}|\Z)") for p in pieces)


def _pattern(atoms: str, then: str, last: str = "") -> re.Pattern[str]:
    """Return a pattern whose group "done" is None where the answer has not come as far as `then`."""
    return re.compile(rf"\s*+{atoms}(?:(?P<done>{then})|\s*+{last}\Z)")


_OBJECT, _TAIL = '{"name": "$name", "arguments": ', "}"
# The first form whose marks a template has counts. Facts: the templates of the models.
FORMS = (
    Form("gpt-oss", ("<|channel|>", "<|message|>"),
         "<|channel|>commentary to=functions.$name <|constrain|>json<|message|>", between=None, has_special=True),
    Form("gemma4", ("<|tool_call>call:",), "<|tool_call>call:$name", "<tool_call|>", quote='<|"|>'),
    Form("functiongemma", ("<start_function_call>",), "<start_function_call>call:$name", "<end_function_call>",
         quote="<escape>", has_special=True),
    Form("mistral-3.2", ("[TOOL_CALLS]", "[CALL_ID]"), "[TOOL_CALLS]$name[CALL_ID]$id[ARGS]", has_special=True),
    Form("mistral", ("[TOOL_CALLS]", "[ARGS]"), "[TOOL_CALLS]$name[ARGS]", has_special=True),
    Form("mistral-nemo", ("[TOOL_CALLS]",), _OBJECT, _TAIL, "[TOOL_CALLS][", "]", ", ", has_special=True),
    Form("deepseek-r1", ("<｜tool▁call▁begin｜>", "```json"),
         "<｜tool▁call▁begin｜>function<｜tool▁sep｜>$name\n```json\n", "\n```<｜tool▁call▁end｜>",
         "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "\n", has_special=True),
    Form("deepseek-v3.1", ("<｜tool▁call▁begin｜>",), "<｜tool▁call▁begin｜>$name<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
         "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", has_special=True),
    Form("minimax-m2", ("<minimax:tool_call>",), '<invoke name="$name">\n', "</invoke>\n", "<minimax:tool_call>\n",
         "</minimax:tool_call>", key='<parameter name="$key">', close="</parameter>\n"),
    Form("seed-oss", ("<seed:tool_call>",), "<function=$name>\n", "</function>", "<seed:tool_call>\n",
         "\n</seed:tool_call>", "\n</seed:tool_call>\n<seed:tool_call>\n", "<parameter=$key>", "</parameter>\n"),
    Form("qwen3-coder", ("<function=", "<parameter="), "<function=$name>\n", "</function>", "<tool_call>\n",
         "\n</tool_call>", "\n</tool_call>\n<tool_call>\n", "<parameter=$key>\n", "\n</parameter>\n"),
    Form("glm-4.7", ("</arg_key><arg_value>",), "<tool_call>$name", "</tool_call>",
         key="<arg_key>$key</arg_key><arg_value>", close="</arg_value>"),
    Form("glm", ("<arg_key>",), "<tool_call>$name\n", "</tool_call>", between="\n",
         key="<arg_key>$key</arg_key>\n<arg_value>", close="</arg_value>\n"),
    Form("command-r", ("<|START_ACTION|>",), '{"tool_call_id": "$id", "tool_name": "$name", "parameters": ', "}",
         "<|START_ACTION|>[\n    ", "\n]<|END_ACTION|>", ",\n    ", has_special=True),
    Form("nemotron", ("<TOOLCALL>",), _OBJECT, _TAIL, "<TOOLCALL>[", "]</TOOLCALL>", ", "),
    Form("apriel", ("<tool_calls>",), _OBJECT, _TAIL, "<tool_calls>[", "]</tool_calls>", ", "),
    Form("granite", ("<|tool_call|>",), _OBJECT, _TAIL, "<|tool_call|>[", "]", ", ", has_special=True),
    Form("hermes", ("<tool_call>",), _OBJECT, _TAIL, "<tool_call>\n", "\n</tool_call>",
         "\n</tool_call>\n<tool_call>\n"),
    Form("llama3", ('"parameters": ', "<|start_header_id|>"), '{"name": "$name", "parameters": ', "}", between=None,
         openers=("<|python_tag|>", ""), has_special=True),
)  # fmt: skip
# For all other models: a program has told them of the tools.
GENERIC = Form("generic", (), _OBJECT, _TAIL, end="</tool_call> ```", between=None,
               openers=("```json", "```tool_code", "```tool_call", "```", "<tool_call>", ""))  # fmt: skip


def form_of(template: str | None) -> Form:
    """Return the form of the calls that a model writes. template: its chat template, None if it has none."""
    return next((form for form in FORMS if template and all(mark in template for mark in form.marks)), GENERIC)
