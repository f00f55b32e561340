"""Renders the chat template that a model's file carries: a Jinja program from a stranger, run in a sandbox.

Settings, filters and functions are those of Hugging Face transformers, for which templates are written. Jinja's
sandbox keeps a template away from Python's insides and from changing its arguments, but lets it run for ever and fill
the memory: so its steps are counted, and the text that it makes, in part before it is made.
"""

import functools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, pass_context
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Concat, Dict, List, Node, Tuple
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from gguf_run.formats.errors import GgufRunError

MAX_STEPS = 20_000_000  # a long conversation takes some ten thousand; where each message looks at all others, millions
MAX_SECONDS = 10.0  # of processor time, since one step can be a long one
MAX_CHARS = 1 << 27  # of all texts made on the way to the result, whether kept or not
MAX_ITEMS = 1 << 18  # of lists in lists, as often as they occur: thirty steps of [x, x] make a billion
MAX_BITS = 1 << 12  # of an integer
MAX_TEMPLATE = 1 << 20  # characters

# Methods of strings and filters whose result may be longer than all they are given.
_GROWING = frozenset({
    "batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "replace", "rjust", "slice",
    "pprint", "string", "tojson", "translate", "wordwrap", "zfill",
})  # fmt: skip
_HOLDERS: tuple[type, ...] = (list, tuple, type({}.keys()), type({}.values()), type({}.items()))
_FORMATS = frozenset({"%", "format", "format_map"})


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str | None,
    eos_token: str | None,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """Return the prompt that a template makes of messages: {"role": "system" | "user" | "assistant", "content": ...}.

    options: variables that it knows besides, such as enable_thinking; they may take the place of the usual ones.
    Most templates write BOS themselves, so encode the result with `Tokenizer.encode_chat`, which never doubles it.
    GgufRunError: the template is damaged, refuses the messages, tries what the sandbox forbids, or does not end.
    """
    try:
        if len(template) > MAX_TEMPLATE:
            raise TemplateError(f"it has {len(template)} characters: {MAX_TEMPLATE} are allowed")
        compiled = _Sandbox().from_string(template)
        with _limited_steps():
            usual = {
                "messages": messages,
                "tools": tools,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                "bos_token": bos_token or "",
                "eos_token": eos_token or "",
            }
            return compiled.render(usual | dict(options or {}))
    except Exception as error:  # a program from a stranger: it may raise anything
        line = f" in line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise GgufRunError(f"the model's chat template failed{line}: {' '.join(reason.split())[:300]}") from None


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on; it changes nothing in a prompt."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # only ever asked what it contains

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _CodeGenerator(CodeGenerator):
    """Sends `a ~ b` and what holds other values through the environment, as all that makes something goes."""

    def visit_Concat(self, node: Concat, frame: Any) -> None:
        self.write("environment.concat(map(str, map(environment.counted, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))))")

    def visit_List(self, node: List, frame: Any) -> None:
        self._counted(super().visit_List, node, frame)

    def visit_Dict(self, node: Dict, frame: Any) -> None:
        self._counted(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: Tuple, frame: Any) -> None:
        if node.ctx == "load":
            self._counted(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _counted(self, visit: Callable[[Any, Any], None], node: Node, frame: Any) -> None:
        self.write("environment.counted(")
        visit(node, frame)
        self.write(")")


class _Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one rendering; it keeps account of the text that is made."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _CodeGenerator

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            optimized=False,  # nothing is computed before the limits hold
            finalize=_finalize,
        )
        self._chars_left: float = MAX_CHARS
        self.concat = self._concat  # type: ignore[method-assign]
        self.filters["tojson"] = _tojson
        self.filters = {name: self._measured(name, filter) for name, filter in self.filters.items()}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            # The bits of a product are those of both factors, those of a power so many times those of its base.
            if (_bits(left) * abs(right) if operator == "**" else _bits(left) + _bits(right)) > MAX_BITS:
                raise TemplateError(f"it makes an integer of more than {MAX_BITS} bits")
        elif operator in ("*", "%"):
            self._before_growth(operator, left, right)
        return self.counted(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps "".format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str) and name in _GROWING:
            __self._before_growth(name, owner, *args, *kwargs.values())
        return __self.counted(super().call(__context, __obj, *args, **kwargs))

    def getitem(self, obj: Any, argument: Any) -> Any:
        return self.counted(super().getitem(obj, argument))

    def _concat(self, parts: Iterable[str]) -> str:
        """Join the result, what a block or a macro makes, `a ~ b`."""
        return self.counted("".join([self.counted(part) for part in parts]))

    def _measured(self, name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(filter)
        def measured(*args: Any, **kwargs: Any) -> Any:
            if name in _GROWING:
                self._before_growth(name, *args, *kwargs.values())
            return self.counted(filter(*args, **kwargs))

        return measured

    def _before_growth(self, name: str, *values: Any) -> None:
        """Check what can come of an operation: at most, each character of a value becomes the largest other value."""
        self._check(math.prod(sorted(max(1, _size(value)) for value in values)[-2:]))
        if name in _FORMATS:
            widths = (re.findall(r"\d{5,}", value) for value in values if isinstance(value, str))
            if any(widths):
                raise TemplateError("it formats a value to a width of more than four digits")

    def counted(self, value: Any) -> Any:
        """Return the value, its size added up; TemplateError if that is too much."""
        size = _size(value) if not isinstance(value, int) else 0
        self._check(size)
        self._chars_left -= size
        return value

    def _check(self, size: int) -> None:
        if size > self._chars_left:
            raise TemplateError(f"it makes more than {MAX_CHARS} characters of text")


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    """Before a value becomes text."""
    return context.environment.counted(value)  # type: ignore[attr-defined]


@contextmanager
def _limited_steps() -> Iterator[None]:
    """Raise in this thread's Python code after MAX_STEPS, calls and lines outside this file, or MAX_SECONDS. A
    debugger's trace is set aside."""
    left, end = MAX_STEPS, time.thread_time() + MAX_SECONDS

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if not left % 16:
            if left < 0:
                raise TemplateError(f"it does not end: more than {MAX_STEPS} steps")
            if time.thread_time() > end:
                raise TemplateError(f"it does not end: more than {MAX_SECONDS:.0f} seconds of processor time")
        return None if frame.f_code.co_filename == __file__ else trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def _size(value: Any) -> int:
    """Return how much text a value is or can make: characters, those of all items (at least 8, as each takes so many
    bytes), or a number itself as a width."""
    if isinstance(value, int):
        return abs(value)
    if isinstance(value, str):
        return len(value)
    n_bytes = 8 * _n_items(value)
    return n_bytes + (
        sum(len(item) for item in value if isinstance(item, str)) if isinstance(value, list | tuple) else 1
    )


def _n_items(value: Any) -> int:
    """Return how many items a list or a dict has, those of its items included."""
    n, rest = 0, [value]
    while rest:
        item = rest.pop()
        if isinstance(item, Namespace):
            item = object.__getattribute__(item, "_Namespace__attrs")
        if isinstance(item, dict):
            item = item.values()
        elif not isinstance(item, _HOLDERS):
            continue
        n += len(item)
        if n > MAX_ITEMS:
            raise TemplateError(f"it makes a list of more than {MAX_ITEMS} items, those of its lists included")
        rest.extend(item)
    return n


def _bits(number: int) -> int:
    return abs(number).bit_length()


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes HTML, which no model has seen."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
