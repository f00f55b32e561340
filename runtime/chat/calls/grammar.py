"""Grammars of answers that call tools, in llguidance's dialect of Lark: what splitter.py reads, enforced."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gguf_run.runtime.chat.answer_parts import TAGS
from gguf_run.runtime.chat.calls.form import Form
from gguf_run.runtime.chat.calls.tools import choices, field, types_of

TokenId = Callable[[str], int | None]
_SPACE = r"/[ \n]{0,3}/"
_NAME = "NAME: /[A-Za-z_][A-Za-z0-9_]*/"
_ANY = """any: string | %json {"type": ["number", "boolean", "null"]} | list | object
list: "[" (any ("," any)*)? "]"
object: "{" (NAME ":" any ("," NAME ":" any)*)? "}\""""  # values in Gemma's form
_DEEPEST = 4  # level of a value of Gemma's that follows its schema


class CallGrammar:
    """Writes a grammar for answers of a form.

    tools: JSON schemas of arguments by the names of tools.
    token_id: returns the id of the control token that a text is, None if it is none: such tokens are no text.
    tag: begins the reasoning of the model, see TAGS; None if it has none. is_open: the prompt ends with the tag.
    """

    def __init__(self, form: Form, tools: Mapping[str, Any], token_id: TokenId, tag: str | None, is_open: bool) -> None:
        self._form, self._token_id, self._tag, self._is_open = form, token_id, tag, is_open
        self._rules = ["TEXT: /(?s:.*)/", _NAME, f"FIRST: /(?s:.*)/ & ~/{re.escape(tag or '')}(?s:.*)/"]
        if form.quote:
            self._rules += [f"string: {self._literal(form.quote)} {self._until(form.quote)}", _ANY]
        write = self._text_arguments if form.key else self._quoted if form.quote else self._json
        self._arguments = {name: self._rule(write(schema)) for name, schema in tools.items()}

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
        # Behind a call that ends with its own mark, text may follow that begins like the next call.
        calls = self._calls(parallel and trigger not in (self._form.between or ""), trigger)
        more = f"({self._until(trigger)} {calls})* TEXT" if parallel else ""
        body = more or f"(TEXT | {self._until(trigger)} {calls})"
        if self._tag is None:
            return self._grammar(body)
        if self._is_open:
            return self._grammar(f"TEXT | {self._think()} {body}")
        # Reasoning is no text: a mark of calls in it begins none.
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
        block = f"{'' if self._is_open else self._literal(self._tag)} {self._until(TAGS[self._tag])} {after}"
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
        calls = ((self._literal(head.replace("$name", name)), rule) for name, rule in self._arguments.items())
        return self._rule(_one_of(f"{head} {rule} {tail}" for head, rule in calls))

    def _json(self, schema: Mapping[str, Any]) -> str:
        return f"%json {json.dumps(schema)}"

    def _text_arguments(self, schema: Mapping[str, Any]) -> str:
        form, found = self._form, []
        mark = form.close.strip()
        text = f"{self._until(mark)} {self._literal(form.close.partition(mark)[2])}"
        if "properties" not in schema:
            before, after = map(self._literal, form.key.split("$key"))
            return f"({before} NAME {after} {text})*"
        for key, value in field(schema, "properties", dict).items():
            types, one_of, body = types_of(value), choices(value), ""
            if one_of:
                body = _one_of(self._literal(v if isinstance(v, str) else json.dumps(v)) for v in one_of)
            elif types and "string" not in types:
                body = self._json({name: schema[name] for name in ("$defs", "definitions") if name in schema} | value)
            end = self._literal(form.close) if body else text
            may_miss = key not in field(schema, "required", list)
            found.append(f"({self._literal(form.key.replace('$key', key))} {body} {end}){'?' * may_miss}")
        return " ".join(found) or '""'

    def _quoted(self, schema: Any, depth: int = 0) -> str:
        """Return a value in Gemma's form. Deep in a schema any value will do."""
        types, quote = types_of(schema), self._form.quote
        if one_of := choices(schema):
            return _one_of(self._literal(f"{quote}{v}{quote}" if isinstance(v, str) else json.dumps(v)) for v in one_of)
        if depth > _DEEPEST or not types:
            return "any"
        found = ["string"] if "string" in types else []
        if "array" in types:
            item = self._rule(self._quoted(schema.get("items"), depth + 1))
            found.append(f'"[" ({item} ("," {item})*)? "]"')
        if "object" in types:
            found.append(self._quoted_object(schema, depth))
        found += [self._json({**schema, "type": kind}) for kind in sorted(types - {"string", "array", "object"})]
        return _one_of(found)

    def _quoted_object(self, schema: Any, depth: int) -> str:
        rest, is_needed = "", False  # of the members, from the last one to the first: is one of them required?
        for key, value in reversed(field(schema, "properties", dict).items()):
            more = f'"," {rest}' if is_needed else f'("," {rest})?' if rest else ""
            may_miss = key not in field(schema, "required", list)
            member = f"{self._literal(key + ':')} {self._quoted(value, depth + 1)} {more}"
            rest = self._rule(member + (f" | {rest}" if rest and may_miss else ""))
            is_needed = is_needed or not may_miss
        if not rest and schema.get("additionalProperties") is not False:
            return "object"
        return f'"{{" {rest} "}}"' if is_needed or not rest else f'"{{" ({rest})? "}}"'

    def _literal(self, text: str) -> str:
        """Return a text as Lark writes it: control tokens by their ids, ids of calls as a pattern."""
        found: list[str] = []
        for piece in filter(None, re.split(r"(\$id|<[^<>\s]+>|\[[A-Z_/]+\])", text)):
            id = self._token_id(piece)
            if piece == "$id" or id is not None:
                found.append("/[A-Za-z0-9]{1,9}/" if id is None else f"<[{id}]>")
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
