"""Grammars of answers that call tools, in llguidance's dialect of Lark: what splitter.py reads, enforced."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gguf_run.runtime.chat.answer_parts import TAGS
from gguf_run.runtime.chat.calls.form import Form
from gguf_run.runtime.chat.calls.tools import types_of

TokenId = Callable[[str], int | None]
# Spaces as Python writes them, which templates show. What llguidance cannot enforce of a schema is not enforced.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?", "lenient": True}
_SPACE = r" /[ \n]{0,3}/"
_ANY = '(string | %json {"type": ["number", "boolean", "null"]} | list | object)'
_ANY_RULES = 'list: "[" (ANY ("," ANY)*)? "]"\nobject: "{" (KEY ":" ANY ("," KEY ":" ANY)*)? "}"\nKEY: /[A-Za-z_]\\w*/'
_DEEPEST = 4  # level of a value of Gemma's that follows its schema


class CallGrammar:
    """Writes a grammar for answers of a form.

    tools: JSON schemas of arguments by the names of tools.
    token_id: returns the id of the control token that a text is, None if it is none: such tokens are no text.
    tag: begins the reasoning of the model, see TAGS; None if it has none. is_open: the prompt ends with the tag.
    """

    def __init__(self, form: Form, tools: Mapping[str, Any], token_id: TokenId, tag: str | None, is_open: bool) -> None:
        self._form, self._token_id, self._tag, self._is_open = form, token_id, tag, is_open
        self._rules = ["TEXT: /(?s:.*)/", f"FIRST: /(?s:.*)/ & ~/{re.escape(tag or '')}(?s:.*)/"]
        if form.quote:
            self._rules += [f"string: {self._literal(form.quote)} {self._until(form.quote)}"]
            self._rules += _ANY_RULES.replace("ANY", _ANY).split("\n")
        self._arguments = {name: self._rule(self._arguments_of(schema)) for name, schema in tools.items()}

    def required(self, parallel: bool) -> str:
        """Return a grammar of one call or, if parallel, of several, behind the reasoning."""
        return self._grammar(f"{self._think(_SPACE)} {self._calls(parallel)}")

    def auto(self, parallel: bool) -> str | None:
        """Return a grammar of text and valid calls; None for forms whose calls begin with no mark of their own."""
        if self._form.openers:
            return None
        if self._form.name == "gpt-oss":
            final = f"{self._literal('<|channel|>final<|message|>')} TEXT"
            return self._grammar(f"{self._think()} ({final} | {self._calls(False)})")
        trigger = self._form.triggers[0]
        calls = self._calls(parallel, trigger)
        more = f"({self._until(trigger)} {calls})* TEXT" if parallel else ""
        body = more or f"(TEXT | {self._until(trigger)} {calls})"
        if self._tag is None:
            return self._grammar(body)
        if self._is_open:
            return self._grammar(f"TEXT | {self._think()} {body}")
        return self._grammar(f"{self._think()[1:-2]} {body} | FIRST | {self._until(trigger, 'FIRST')} {calls} {more}")

    def _grammar(self, start: str) -> str:
        return "\n".join([f"start: {start}", *self._rules])

    def _rule(self, body: str, options: str = "") -> str:
        self._rules.append(f"r{len(self._rules)}{options}: {body}")
        return f"r{len(self._rules) - 1}"

    def _think(self, after: str = "") -> str:
        if self._form.name == "gpt-oss":
            begin = f'{self._literal("<|channel|>")} ("analysis" | "commentary") {self._literal("<|message|>")}'
            return f"({begin} {self._until('<|end|>')} {self._literal('<|start|>assistant')})*"
        if self._tag is None:
            return ""
        block = f"{'' if self._is_open else self._literal(self._tag)} {self._until(TAGS[self._tag])}{after}"
        return block if self._is_open else f"({block})?"

    def _calls(self, parallel: bool, before: str = "") -> str:
        """Return begin, calls and end. before: what stands there already, the beginning of it."""
        form = self._form
        if before and not form.begin:
            return self._call(before)
        more = f"({self._literal(form.between)} {self._call()})*" if parallel and form.between is not None else ""
        end = self._literal(form.end) if form.begin else ""
        return f"{self._literal(form.begin.removeprefix(before))} {self._call()} {more} {end}"

    def _call(self, before: str = "") -> str:
        head, tail = self._form.head.removeprefix(before), self._literal(self._form.tail)
        heads = {name: self._literal(head.replace("$name", name)) for name in self._arguments}
        return self._rule(_one_of(f"{heads[name]} {rule} {tail}" for name, rule in self._arguments.items()))

    def _arguments_of(self, schema: Any) -> str:
        schema = {"type": "object"} | (schema if isinstance(schema, dict) else {})
        if self._form.key:
            return self._text_arguments(schema)
        return self._quoted(schema, 0) if self._form.quote else self._json(schema)

    def _json(self, schema: Mapping[str, Any]) -> str:
        return f"%json {json.dumps({'x-guidance': _STYLE} | dict(schema))}"

    def _text_arguments(self, schema: Mapping[str, Any]) -> str:
        form, found = self._form, []
        mark = form.close.strip()
        text = f"{self._until(mark)} {self._literal(form.close.partition(mark)[2])}"
        for key, value in schema.get("properties", {}).items():
            value, types = value if isinstance(value, dict) else {}, types_of(value)
            head = self._literal(form.key.replace("$key", key).replace("$id", str(types == {"string"}).lower()))
            if choices := _choices(value):
                values = _one_of(self._literal(v if isinstance(v, str) else json.dumps(v)) for v in choices)
                body = f"{values} {self._literal(form.close)}"
            elif "string" in types or not types:
                body = text
            else:
                roots = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
                body = f"{self._json(roots | value)} {self._literal(form.close)}"
            found.append(f"({head} {body}){'' if key in schema.get('required', []) else '?'}")
        return " ".join(found) or '""'

    def _quoted(self, schema: Any, depth: int) -> str:
        """Return a value in Gemma's form. Deep in a schema any value will do."""
        types, quote = types_of(schema), self._form.quote
        if choices := _choices(schema):
            texts = [f"{quote}{value}{quote}" if isinstance(value, str) else json.dumps(value) for value in choices]
            return _one_of(map(self._literal, texts))
        if depth > _DEEPEST or not types:
            return _ANY
        found = ["string"] if "string" in types else []
        if "array" in types:
            item = self._rule(self._quoted(schema.get("items"), depth + 1))
            found.append(f'"[" ({item} ("," {item})*)? "]"')
        if "object" in types:
            rest, needed, must = "", schema.get("required", []), False
            for key, value in reversed(schema.get("properties", {}).items()):
                more = f'"," {rest}' if must else f'("," {rest})?' if rest else ""
                member = f"{self._literal(key + ':')} {self._quoted(value, depth + 1)} {more}"
                rest = self._rule(member + (f" | {rest}" if rest and key not in needed else ""))
                must = must or key in needed
            found.append(f'"{{" {rest} "}}"' if must else f'"{{" ({rest})? "}}"' if rest else "object")
        found += [self._json(dict(schema) | {"type": kind}) for kind in sorted(types - {"string", "array", "object"})]
        return _one_of(found)

    def _literal(self, text: str) -> str:
        """Return a text as Lark writes it: control tokens by their ids, ids of calls as a pattern."""
        found: list[str] = []
        for piece in filter(None, re.split(r"(\$id|<[^<>\s]+>|\[[A-Z_/]+\])", text)):
            id = self._token_id(piece)
            if piece == "$id":
                found.append("/[A-Za-z0-9]{1,9}/")
            elif id is not None:
                found.append(f"<[{id}]>")
            elif found and found[-1].startswith('"'):
                found[-1] = json.dumps(json.loads(found[-1]) + piece, ensure_ascii=False)
            else:
                found.append(json.dumps(piece, ensure_ascii=False))
        return " ".join(found)

    def _until(self, mark: str, text: str = "TEXT") -> str:
        """Return any text up to a mark, with the mark."""
        if self._token_id(mark) is not None:
            return f"{text} {self._literal(mark)}"
        return self._rule(text, f"[suffix={json.dumps(mark, ensure_ascii=False)}]")


def _one_of(bodies: Iterable[str]) -> str:
    return f"({' | '.join(bodies)})"


def _choices(schema: Any) -> list[Any]:
    return [schema["const"]] if "const" in schema else schema.get("enum", [])
