"""GBNF, llama.cpp's language of grammars, written as a Lark grammar of llguidance. Start with `to_lark`.

Lark's terminals are regular expressions, which the matcher reads as far as they go; its rules may be recursive. So what
is regular becomes a terminal as a whole, and two neighbours become one: "a"* "ab" must not end in its first part. In a
recursive grammar blanks that repeat stay apart: what follows often begins with one. Where another terminal could have
ended sooner, the Lark grammar lacks texts of the GBNF grammar; it never has others.
"""

import json
import re
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from gguf_run.formats.errors import OptionError

_DEEPEST = 25  # parentheses in each other: llguidance reads 30
_TOKEN = re.compile(
    r"""(?P<skip>[ \t\r\n]+|\#[^\n]*)|(?P<name>[A-Za-z0-9_-]+)|(?P<define>::=)|(?P<mark>[|()])|(?P<any>\.)
    |(?P<text>"(?:\\.|[^"\\\n])*")|(?P<set>\[(?:\\.|[^\]\\\n])*\])|(?P<token><[^<>\s]+>)
    |(?P<repeat>[*+?]|\{[ ]*\d{1,9}[ ]*(?:,[ ]*(?:\d{1,9})?[ ]*)?\})""",
    re.VERBOSE,
)
_CHARACTER = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))|([^\\])", re.DOTALL)
_BLANK = re.compile(r'\[(?:\\[nrt]|[ \t])+\]|"(?:\\[nrt]|[ \t])+"')
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "[": "[", "]": "]", "-": "-", "^": "^"}


class _Node(NamedTuple):
    """A part of a rule."""

    # "text": Lark for characters; "token", "rule": a name; "sequence", "choice", "repeat"; "blanks": a repeat of blanks
    kind: str
    text: str = ""  # Lark, a name, or how often
    parts: "tuple[_Node, ...]" = ()

    def rules(self) -> Iterator[str]:
        """Yield the names of the rules in it, "<>" for a token, which no terminal may hold, " " for blanks."""
        if mark := {"rule": self.text, "token": "<>", "blanks": " "}.get(self.kind):
            yield mark
        for part in self.parts:
            yield from part.rules()


def to_lark(text: str) -> str:
    """Return a Lark grammar of the same language. OptionError names the line of what is wrong or not known."""
    rules = _Reader(text).rules()
    for name, node in rules.items():
        if missing := [used for used in node.rules() if used not in rules and used not in ("<>", " ")]:
            raise OptionError(f"GBNF grammar: the rule {name} uses {missing[0]}, which is not defined: define it")
    return _Writer(rules).lark()


class _Writer:
    """Writes rules as Lark. Its names are short, because Lark's do not have all letters: r1, and T1 for terminals."""

    def __init__(self, rules: dict[str, _Node]) -> None:
        self._rules, self._lines = rules, list[str]()
        self._regular = {" "}  # rules that use regular ones only
        self._find_regular()
        if "root" not in self._regular:
            self._regular.clear()
            self._find_regular()
        self._names = {name: f"{'T' if name in self._regular else 'r'}{i}" for i, name in enumerate(rules)}

    def lark(self) -> str:
        """Return the whole grammar."""
        for name, node in self._rules.items():
            self._lines.append(f"{self._names[name]}: {self._written(node, name in self._regular)}")
        return "\n".join([f"start: {self._names['root']}", *self._lines])

    def _find_regular(self) -> None:
        n_before = -1
        while n_before < (n_before := len(self._regular)):
            self._regular |= {name for name, node in self._rules.items() if self._is_regular(node)}

    def _is_regular(self, node: _Node) -> bool:
        return self._regular.issuperset(node.rules())

    def _written(self, node: _Node, in_terminal: bool) -> str:
        if not node.parts:
            return self._names[node.text] if node.kind == "rule" else node.text
        if not in_terminal and self._is_regular(node):
            return self._terminal([node])
        if node.kind == "choice":
            return f"({' | '.join(self._written(part, in_terminal) for part in node.parts)})"
        if node.kind in ("repeat", "blanks"):
            return self._written(node.parts[0], in_terminal) + node.text
        parts = list[str]()
        for joined, group in groupby(node.parts, lambda part: not in_terminal and self._is_regular(part)):
            run = [*group]
            parts += [self._terminal(run)] if joined else [self._written(part, in_terminal) for part in run]
        return f"({' '.join(parts)})"

    def _terminal(self, run: list[_Node]) -> str:
        """Return the name of a terminal for neighbours."""
        if len(run) == 1 and not run[0].parts:
            return self._written(run[0], True)
        written = self._written(_Node("sequence", "", tuple(run)), True)
        self._lines.append(f"X{len(self._lines)}: {written}")
        return f"X{len(self._lines) - 1}"


class _Reader:
    """Reads the rules of a grammar."""

    def __init__(self, text: str) -> None:
        self._text, self._tokens, self._at = text, list[tuple[str, str, int]](), 0
        end = 0
        while end < len(text):
            match = _TOKEN.match(text, end)
            if match is None or match.lastgroup is None:
                raise self._error(f"{text[end : end + 20].splitlines()[0]!r} is not known", end)
            if match.lastgroup != "skip":
                self._tokens.append((match.lastgroup, match[0], end))
            end = match.end()
        self._tokens += [("end", "the end", end)] * 2

    def rules(self) -> dict[str, _Node]:
        """Return the rules by name."""
        found = dict[str, _Node]()
        while self._tokens[self._at][0] != "end":
            (kind, name, at), (define, _, _) = self._tokens[self._at : self._at + 2]
            if kind != "name" or define != "define" or name in found:
                raise self._error(f"{name} stands where a new rule must begin, as in `name ::= ...`", at)
            self._at += 2
            found[name] = self._choice(0)
        if "root" not in found:
            raise OptionError("GBNF grammar: there is no rule `root`: define it")
        return found

    def _choice(self, depth: int) -> _Node:
        if depth > _DEEPEST:
            raise self._error(f"parentheses are nested more than {_DEEPEST} deep", self._tokens[self._at][2])
        branches = [self._sequence(depth)]
        while self._tokens[self._at][1] == "|" and self._tokens[self._at][0] == "mark":
            self._at += 1
            branches.append(self._sequence(depth))
        return branches[0] if len(branches) == 1 else _Node("choice", "", tuple(branches))

    def _sequence(self, depth: int) -> _Node:
        parts = list[_Node]()
        while True:
            kind, text, at = self._tokens[self._at]
            if kind == "name" and self._tokens[self._at + 1][0] != "define":
                parts.append(_Node("rule", text))
            elif kind == "token":
                parts.append(_Node("token", text))
            elif kind in ("text", "set", "any"):
                parts.append(_Node("text", "/(?s:.)/" if kind == "any" else self._characters(text, at)))
            elif kind == "repeat" and parts:
                last = parts[-1]
                is_blank = last.kind == "text" and _BLANK.fullmatch(self._tokens[self._at - 1][1])
                inner = _Node("sequence", "", (last,)) if last.kind in ("repeat", "blanks") else last
                parts[-1] = _Node("blanks" if is_blank else "repeat", text.replace(" ", ""), (inner,))
            elif (kind, text) == ("mark", "("):
                self._at += 1
                parts.append(self._choice(depth + 1))
                if self._tokens[self._at][1] != ")":
                    raise self._error("a parenthesis is not closed", at)
            elif kind in ("repeat", "define") or (text == ")" and not depth):
                raise self._error(f"{text} has nothing before it", at)
            else:
                return _Node("sequence", "", tuple(parts)) if parts else _Node("text", '""')
            self._at += 1

    def _characters(self, text: str, at: int) -> str:
        """Return a literal, or a set of characters, as Lark."""
        is_set, inner = text[0] == "[", text[1:-1]
        negation = is_set and inner.startswith("^")
        characters = list[str]()
        for match in _CHARACTER.finditer(inner, int(negation)):
            code = match[1] or match[2] or match[3]
            character = chr(int(code, 16)) if code and int(code, 16) < 0x110000 else match[5] or _ESCAPES.get(match[4])
            if character is None or "\ud800" <= character <= "\udfff":
                raise self._error(f"the escape {match[0]} is not known", at)
            is_range = match[5] == "-" and is_set and characters and match.end() < len(inner)
            characters.append("-" if is_range else f"\\x{{{ord(character):X}}}" if is_set else character)
        if not is_set:
            return json.dumps("".join(characters)).replace("\x7f", "\\u007f")
        if not characters:
            raise self._error(f"{text} holds no character", at)
        return f"/[{'^' * negation}{''.join(characters)}]/"

    def _error(self, what: str, at: int) -> OptionError:
        return OptionError(f"GBNF grammar, line {self._text.count(chr(10), 0, at) + 1}: {what}: change the grammar")
