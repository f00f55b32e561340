"""GBNF as Lark: the same texts are allowed, all short ones and some long ones, and errors name the line."""

import itertools
import re
from collections.abc import Callable

import pytest

from gguf_run.formats.errors import OptionError
from gguf_run.runtime.engine.gbnf import to_lark

llguidance = pytest.importorskip("llguidance")
TOKENS = llguidance.LLTokenizer("byte")
JSON = r"""
# of llama.cpp's form
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::=
  "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""
ARITHMETIC = r"""
root ::= (expr "=" ws term "\n")+
expr ::= term ([-+*/] term)*
term ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws   # a name
num ::= [0-9]+ ws
ws ::= [ \t\n]*
"""


def matcher(grammar: str) -> Callable[[str], bool]:
    """Return a function that tells whether a text is of the grammar."""
    start = llguidance.LLMatcher(TOKENS, llguidance.LLMatcher.grammar_from_lark(to_lark(grammar)), log_level=0)
    assert not start.is_error(), start.get_error()

    def matches(text: str) -> bool:
        one, data = start.deep_copy(), [*text.encode()]
        return bool(one.try_consume_tokens(data) == len(data) and one.is_accepting())

    return matches


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ('root ::= "a"* "ab"', "a*ab"),
        ('root ::= ("ab" | "a") b?\nb ::= "b"+ | ","', "(ab|a)(b+|,)?"),
        ("root ::= [^a-b] | [,a] [b-]", "[^ab]|[,a][b-]"),
        ("root ::= [\\x61,\\]]{2} .?", "[a,\\]]{2}[\\s\\S]?"),
        ('root ::= x{1,2} "b"{2,} | "" | ("a" | "b,"){ 3 }\nx ::= "a" | y\ny ::= [,b]', "[,ab]{1,2}b{2,}||(a|b,){3}"),
        ('root ::= "a"+?? | ("b"* ",")+', "a*|(b*,)+"),
        ('root-1 ::= "a"\n\nroot ::=\n  root-1 |\n  "b" # or\n  | ","', "[ab,]"),
    ],
)
def test_regular_grammars(grammar: str, pattern: str) -> None:
    """Against Python's re, for all short texts."""
    matches = matcher(grammar)
    for n in range(6):
        for text in map("".join, itertools.product("ab,", repeat=n)):
            assert matches(text) == (re.fullmatch(pattern, text) is not None), text


def test_recursive_grammars() -> None:
    """Against the reduction of a text, for all short texts."""
    balanced = matcher('root ::= "(" root ")" root | ""')
    nested = matcher('root ::= "a" root "b" | ","')
    blanks = matcher('root ::= "(" root ")" | [ ]* "," [ ]* " ,"')
    for n in range(8):
        for text in map("".join, itertools.product("()", repeat=n)):
            assert balanced(text) == (reduced(text, "()", "") == ""), text
    for n in range(7):
        for text in map("".join, itertools.product("a,b", repeat=n)):
            assert nested(text) == (reduced(text, "a,b", ",") == ","), text
        for text in map("".join, itertools.product("(, )", repeat=n)):
            core = text.strip("()")
            expected = re.fullmatch(" *, * ,", core) and reduced(text, f"({core})", core) == core
            assert blanks(text) == bool(expected), text


def reduced(text: str, part: str, by: str) -> str:
    """Return the text in which `part` has been replaced until there is none."""
    while part in text:
        text = text.replace(part, by)
    return text


@pytest.mark.parametrize(
    ("grammar", "texts", "others"),
    [
        (
            JSON,
            ["{}", '{"a":1}', '{"a": [1, -2.5e-3,"x\\n\\u00e9", {"b":null}], "c":{} }', '{"é😀":true}\n  '],
            ["", "{", "[1]", '{"a":tru}', '{"a":1,}', '{"a":"\n"}', '{"a":01}', "{}  "],
        ),
        (ARITHMETIC, ["a+b*(3 -c1)= 4 \n\n\n", "x=(y\n) \nz=1\n"], ["a+=4\n", "a=4", "(a=4\n"]),
        (r'root ::= "\u00e9" "\U0001F600" "\x41\x7f\"\\"', ['é😀A\x7f"\\'], ["é", "é😀A\x7f"]),
        ('root ::= l\nl ::= l "x" | "x"', ["x", "x" * 3000], ["", "y"]),
        ('root ::= l\nl ::= "x" l | "x"', ["x" * 300], ["", "xy"]),
    ],
    ids=["json", "arithmetic", "escapes", "left", "right"],
)
def test_long_texts(grammar: str, texts: list[str], others: list[str]) -> None:
    matches = matcher(grammar)
    assert [text for text in texts if not matches(text)] == []
    assert [text for text in others if matches(text)] == []


def test_tokens_stay() -> None:
    assert "(<|a|> <[5]> /[\\x{61}]/)" in to_lark("root ::= <|a|> <[5]> [a]")


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ("", "there is no rule `root`"),
        ('x ::= "a"', "there is no rule `root`"),
        ("root ::= a", "the rule root uses a, which is not defined"),
        ('root ::= "a"\n  "b', "line 2: '\"b' is not known"),
        ("root ::= (", "line 1: a parenthesis is not closed"),
        ("root ::= )", ") has nothing before it"),
        ("root ::= *", "* has nothing before it"),
        ('root ::= "\\q"', "the escape \\q is not known"),
        ('root ::= "\\ud800"', "the escape \\ud800 is not known"),
        ("root ::= []", "[] holds no character"),
        ('root := "a"', "':= \"a\"' is not known"),
        ('root ::= "a" ::= "b"', "::= has nothing before it"),
        ("root ::= !<[5]>", "'!<[5]>' is not known"),
        ('root ::= "a"\nroot ::= "b"', "line 2: root stands where a new rule must begin"),
        ("root ::= " + 26 * "(" + '"a"' + 26 * ")", "parentheses are nested more than 25 deep"),
        ('root ::= "a"{1000000000000}', "is not known"),
    ],
)
def test_errors(grammar: str, words: str) -> None:
    with pytest.raises(OptionError, match=re.escape(words)):
        to_lark(grammar)
