"""Answers of a form that a JSON schema, a regular expression or a grammar describes, by the library llguidance.

Start with Grammars.constraint. What strangers write is tried in a helper process first, whose time, memory and stack
are limited: llguidance is quick with nearly all of it, but some schemas take for ever, and deep ones end the process.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from threading import Lock, Thread, stack_size
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.formats.frozen import frozen
from gguf_run.runtime.chat.process import HelperProcess

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

KINDS = ("json_schema", "json_object", "regex", "lark", "gbnf")
MAX_BYTES = 1 << 18  # of a grammar's text
_STACK = 1 << 20  # bytes, the least that a system gives a thread
MOST_KEPT = 32  # compiled grammars: the worst take 20 MB each
_BLANKS = r" |\n[ \t]{0,32}"  # between the parts of a JSON text, once: a model must not write blanks for ever
# Keywords of JSON schema that nothing here enforces, with the value that asks for nothing. Other unknown keywords are
# notes, as the standard says.
_REFUSED = {
    **{"uniqueItems": False, "unevaluatedProperties": True, "unevaluatedItems": True},
    **dict.fromkeys(("not", "if", "then", "else", "contains", "propertyNames", "dependencies", "dependentRequired")),
    **dict.fromkeys(("dependentSchemas", "$dynamicRef", "$recursiveRef")),
}
# Formats that are enforced. Others are notes.
_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
_SCHEMAS = {"items", "additionalItems", "additionalProperties", "prefixItems", "anyOf", "oneOf", "allOf"}
_NAMED = {"properties", "patternProperties", "$defs", "definitions"}  # hold schemas by name
_ONE_OF = ". Enable 'coerce_one_of' option to approximate oneOf with anyOf"  # an option that users have not
# A schema within a Lark grammar, and what may hold the same letters: a text, a comment, a regular expression.
_LARK = re.compile(r'%json\s*(?=\{)|"(?:\\.|[^"\\\n])*"|(?:#|//)[^\n]*|/(?:\\.|[^/\\\n])+/')


@frozen
class Grammar:
    """What an answer may be."""

    kind: str  # see KINDS
    text: str = ""  # in the language of the kind; lark: that of llguidance; nothing for json_object

    @classmethod
    def of(cls, text: str) -> "Grammar":
        """Return the grammar of a text in GBNF, which has a line `name ::= ...`, or in Lark."""
        return cls("gbnf" if re.search(r"^[ \t]*[\w-]+[ \t]*::=", text, re.MULTILINE) else "lark", text)


def grammar_of(json_schema: "Mapping[str, Any] | str | None", grammar: "Grammar | str | None") -> Grammar:
    """Return what the options of Model.generate ask for. OptionError for both of them, or values of other types."""
    if json_schema is not None and grammar is not None:
        raise OptionError("json_schema (--json-schema) and grammar (--grammar) exclude each other: give one")
    if isinstance(grammar, str):
        return Grammar.of(grammar)
    if isinstance(json_schema, str | Mapping):
        with suppress(TypeError, ValueError, RecursionError):
            return Grammar("json_schema", json_schema if isinstance(json_schema, str) else json.dumps(json_schema))
    if isinstance(grammar, Grammar):
        return grammar
    raise OptionError(
        f"json_schema or grammar is {json_schema or grammar!r:.80}; allowed: JSON as a dict or a text; a text"
    )


def constrained(model: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of Model.generate with a constraint, which is for one answer, in place of json_schema or grammar.

    model: a Model; its Grammars are kept there.
    """
    others = dict(options)
    json_schema, grammar = others.pop("json_schema", None), others.pop("grammar", None)
    if json_schema is not None or grammar is not None:
        if others.get("constraint") is not None:
            raise OptionError("json_schema or grammar, and constraint exclude each other: give one")
        asked = grammar_of(json_schema, grammar)
        model.grammars = model.grammars or Grammars(model.tokenizer, model.decoder.config.n_vocab)
        others["constraint"] = model.grammars.constraint(asked)
    return others


class _GrammarProcess(HelperProcess):
    subject, work, cpu_s = "a grammar", "gguf_run.runtime.engine.grammar:attempt", 1.0
    advice = "make it simpler"


class Grammars:
    """The grammars of a model. Threads may share it."""

    def __init__(self, tokenizer: "Tokenizer", n_vocab: int | None = None) -> None:
        """Prepare the vocabulary: 0.2 s for 128,000 tokens.

        n_vocab: logits of the model, if they are not those of the tokenizer.
        OptionError if llguidance is missing, GgufRunError if no token ends an answer.
        """
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            raise OptionError('grammars need llguidance: pip install "gguf-run[serve]"') from None
        self._process = _GrammarProcess().start()
        self._words = _Words(tokenizer, n_vocab or tokenizer.n_vocab)
        self._tokens: LLTokenizer = LLTokenizer(TokenizerWrapper(self._words), eos_token=self._words.ends)
        self._words.greedy = self._tokens.greedy_tokenize
        self._kept: OrderedDict[Grammar, LLMatcher] = OrderedDict()  # compiled, those used last at the end
        self._lock = Lock()

    def constraint(self, grammar: Grammar) -> "GrammarConstraint":
        """Return a constraint for one answer. OptionError for a grammar that is wrong or takes too much to compile."""
        with self._lock:
            matcher = self._kept.get(grammar)
        if matcher is None:
            names = grammar.kind in ("lark", "gbnf") and "<" in grammar.text
            vocabulary = {
                "special": self._words.special if names else {},
                "n_vocab": self._words.n_vocab if names else 0,
            }
            error = self._process.ask({"kind": grammar.kind, "text": grammar.text, **vocabulary}).get("error")
            if error is not None:
                raise OptionError(f"the {grammar.kind} of the answer{error}")
            matcher = _matcher(self._tokens, grammar)
        with self._lock:
            self._kept[grammar] = matcher
            self._kept.move_to_end(grammar)
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
            return GrammarConstraint(matcher.deep_copy(), self._words)

    def close(self) -> None:
        """End the helper process. Constraints stay usable."""
        self._process.close()


class GrammarConstraint:
    """What may follow in an answer: see constraint.py."""

    def __init__(self, matcher: "LLMatcher", words: "_Words") -> None:
        self._matcher, self._words = matcher, words
        self._mask = np.zeros((words.n_vocab + 31) // 32, np.uint32)

    def allowed(self) -> NDArray[np.uint32]:
        """Return the mask, which stays as it is until the next call. GgufRunError if the grammar is too complex."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        return self._mask

    def accept(self, id: int) -> None:
        """Note the token that has come. GgufRunError if it is not allowed."""
        self._matcher.consume_token(id)
        self._check()

    def forced(self) -> Sequence[int]:
        """Return the tokens of the only text that may come next; the end, if nothing may.

        They are those that the tokenizer makes of this text. The last ones wait if a longer token may come in their
        place, so that the model sees the tokens that it has been trained on.
        """
        ids = self._matcher.compute_ff_tokens()
        self._matcher.consume_tokens(ids)
        self._check()
        return [*ids, self._words.eos_token_id] if self._matcher.is_stopped() else ids

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GgufRunError(f"the grammar of the answer: {_first_line(self._matcher.get_error())}: make it simpler")


class _Words:
    """The vocabulary in the form that llguidance asks for."""

    def __init__(self, tokenizer: "Tokenizer", n_vocab: int) -> None:
        n = min(n_vocab, tokenizer.n_vocab)
        self.ends = sorted(id for id in tokenizer.stop_ids if id < n)
        if not self.ends:
            raise GgufRunError("the model has no token that ends an answer: it cannot follow a grammar")
        self.eos_token_id = tokenizer.eos if tokenizer.eos in self.ends else self.ends[0]
        self.bos_token_id = tokenizer.bos
        texts = [tokenizer.piece(id, skip_special=True) for id in range(n)]  # b"" for control tokens
        # A grammar may name control tokens, as <|im_end|>; as text they are never allowed, nor is what ends an answer.
        special = [id for id, text in enumerate(texts) if not text or id in tokenizer.stop_ids]
        self.special = {tokenizer.piece(id).decode(errors="replace"): id for id in special}
        self.special.pop("", None)
        self.special_token_ids = [*self.special.values()]
        for name, id in self.special.items():
            texts[id] = name.encode()
        self.tokens: Sequence[bytes] = texts + [b""] * (n_vocab - n)
        self.n_vocab = n_vocab
        self._tokenizer, self.greedy = tokenizer, tokenizer.encode_inside

    def __call__(self, text: bytes) -> list[int]:
        """Return the ids of forced text; by the longest tokens, if the tokenizer's would stand for another text."""
        ids = self._tokenizer.encode_inside(text.decode())
        return ids if b"".join(map(self._tokenizer.piece, ids)) == text else self.greedy(text.decode())


def attempt(kind: str, text: str, special: dict[str, int], n_vocab: int) -> dict[str, str]:
    """Compile a grammar for a vocabulary of bytes, in the helper process. Return {"error": what is wrong}, or {}.

    special: control tokens that it may name. n_vocab: of the model; both are empty for a grammar without tokens.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    found: dict[str, str] = {}

    def run() -> None:
        try:
            _matcher(LLTokenizer(TokenizerWrapper(_Bytes(special, n_vocab))), Grammar(kind, text))
        except BaseException as error:  # a panic of the library is no Exception
            found["error"] = f": {error}"

    stack_size(_STACK)  # what fits here fits into any thread
    thread = Thread(target=run)
    thread.start()
    thread.join()
    return found


class _Bytes:
    """A vocabulary of all bytes and of control tokens, which have the ids that they have in the model's."""

    def __init__(self, special: dict[str, int], n_vocab: int) -> None:
        self.special_token_ids = [*special.values()]
        self.tokens = [b""] * (n_vocab + 257)
        for name, id in special.items():
            self.tokens[id] = name.encode()
        free = [id for id, text in enumerate(self.tokens) if not text]
        for byte in range(256):
            self.tokens[free[byte]] = bytes([byte])
        self.eos_token_id, self.bos_token_id = free[256], None

    def __call__(self, text: bytes) -> list[int]:
        return [self.tokens.index(bytes([byte])) for byte in text]


def _matcher(tokens: "LLTokenizer", grammar: Grammar) -> "LLMatcher":
    """Compile a grammar. OptionError for what is wrong with it."""
    from llguidance import LLMatcher, LLParserLimits

    if grammar.kind not in KINDS or len(grammar.text) > MAX_BYTES:
        raise OptionError(
            f"{len(grammar.text)} characters of the kind {grammar.kind:.40}; allowed: {MAX_BYTES} of {', '.join(KINDS)}"
        )
    try:
        compiled = LLMatcher.grammar_from_regex(grammar.text) if grammar.kind == "regex" else _compiled(grammar)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{_first_line(str(error))}: correct it") from None
    limits = LLParserLimits(
        max_grammar_size=50_000, max_lexer_states=10_000, initial_lexer_fuel=100_000, verbose_errors=False
    )
    matcher = LLMatcher(tokens, compiled, log_level=0, limits=limits)
    matcher.compute_bitmask()  # the first mask takes longest
    if matcher.is_error():
        what = _first_line(matcher.get_error()).replace(_ONE_OF, " whose branches may hold together: write anyOf")
        raise OptionError(f"{what}: change it")
    return matcher


def _compiled(grammar: Grammar) -> str:
    from llguidance import LLMatcher

    if grammar.kind in ("json_schema", "json_object"):
        text = grammar.text if grammar.kind == "json_schema" else '{"type": "object"}'
        return LLMatcher.grammar_from_json_schema(_schema(json.loads(text)))
    if grammar.kind == "gbnf":
        from gguf_run.runtime.engine.gbnf import to_lark

        return LLMatcher.grammar_from_lark(to_lark(grammar.text))
    parts, at, text = list[str](), 0, grammar.text
    while match := _LARK.search(text, at):
        parts.append(text[at : match.end()])
        at = match.end()
        if match[0].startswith("%json"):
            schema, at = json.JSONDecoder().raw_decode(text, at)
            # The style may say that what cannot be enforced of a schema is not: llguidance's "lenient".
            parts.append(json.dumps(schema) if "x-guidance" in schema else _schema(schema))
    return LLMatcher.grammar_from_lark("".join([*parts, text[at:]]))


def _schema(schema: Any) -> str:
    """Return a JSON schema as llguidance reads it. OptionError names the place of a keyword that is not supported."""
    schema = {} if schema is True else schema
    if not isinstance(schema, dict):
        raise OptionError(f"it is {json.dumps(schema):.40}; allowed: an object, or true")
    return json.dumps({**_checked(schema, "#"), "x-guidance": {"whitespace_pattern": _BLANKS}})


def _checked(node: Any, path: str, is_named: bool = False) -> Any:
    """Return a schema, or a part of one, without notes that llguidance would refuse. is_named: its keys are names."""
    if isinstance(node, list):
        return [_checked(one, f"{path}/{i}") for i, one in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    found = {}
    for key, value in node.items():
        if is_named:
            found[key] = _checked(value, f"{path}/{key}")
        elif key in _REFUSED and value is not _REFUSED[key]:
            raise OptionError(f"the keyword {key} at {path} is not supported: leave it out")
        elif key not in _REFUSED and (key != "format" or value in _FORMATS):
            holds = key in _SCHEMAS or key in _NAMED
            found[key] = _checked(value, f"{path}/{key}", key in _NAMED) if holds else value
    return found


def _first_line(text: str) -> str:
    """Return the line of a message that tells most."""
    lines = text.split("\n")
    return next((line for line in lines if line.startswith("error: ")), lines[0]).strip()[:300]
