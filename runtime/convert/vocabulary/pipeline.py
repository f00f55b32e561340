"""What a tokenizer.json does to a text before and after its model: normalizers, cuts, tokens around the text.

Some steps have a key in GGUF. The others are kept as they are, under keys that only this program reads.
"""

import base64
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gguf_run.formats.errors import FormatError
from gguf_run.runtime.convert.vocabulary.vocabulary import SPACE, Vocabulary, text_of, warn
from gguf_run.runtime.tokenizers.steps import MAX_JSON_CHARS, NORMALIZERS, PRE_TOKENIZERS, build_step

_Step = dict[str, Any]
_ALLOWED = {"normalizer": NORMALIZERS, "pre_tokenizer": PRE_TOKENIZERS}


def steps(component: Any, path: Path) -> Iterator[_Step]:
    """Yield the steps of a normalizer, pre-tokenizer, decoder or post-processor. Sequences are flattened."""
    stack = [component]
    while stack:
        item = stack.pop()
        if item is None:
            continue
        if not isinstance(item, dict) or not isinstance(item.get("type"), str):
            raise FormatError(f"{path}: a step is {str(item)[:60]}: it needs a type")
        if item["type"] == "Sequence":
            inner = next((v for v in item.values() if isinstance(v, list)), [])
            stack += reversed(inner)
        else:
            yield item


def keep_steps(
    vocabulary: Vocabulary, kind: str, kept: Sequence[_Step], path: Path, *, replace: bool = False, say: bool = True
) -> None:
    """Write steps that GGUF has no key for as they are.

    kind: "normalizer" or "pre_tokenizer".
    replace: an empty list counts too: the usual steps of this kind of vocabulary are not done.
    say: give a ConversionWarning, since other programs do not know the steps.
    """
    if kind == "normalizer" and not replace and [step["type"] for step in kept] in (["NFC"], ["NFKC"]):
        vocabulary.more[f"normalizer.{kept[0]['type'].lower()}"] = True
        return
    lost = [step["type"] for step in kept if step["type"] not in _ALLOWED[kind]]
    kept = [step for step in kept if step["type"] in _ALLOWED[kind]]
    text = json.dumps(kept)
    if lost or len(text) > MAX_JSON_CHARS:
        names = ", ".join(dict.fromkeys(lost)) or f"steps, of {len(text)} characters,"
        warn(path, f"its {kind} {names[:100]} has no place in a GGUF file: some texts will get other tokens")
    if (not kept and not replace) or len(text) > MAX_JSON_CHARS:
        return
    for step in kept:
        build_step(step, kind, str(path))
    vocabulary.more[f"{kind}.json"] = text
    names = ", ".join(dict.fromkeys(step["type"] for step in kept)) or "has no steps, which"
    if say:
        warn(path, f"its {kind} ({names}) is kept for gguf-run alone: in llama.cpp some texts get other tokens")


def read_spaced_steps(data: _Step, vocabulary: Vocabulary, path: Path) -> None:
    """Find out what becomes of spaces in a vocabulary that spells them "▁", and keep the other steps."""
    unigram = vocabulary.model == "t5"
    prefix = escapes = joins = False
    others: list[_Step] = []
    for step in steps(data.get("normalizer"), path):
        pattern = step.get("pattern")
        if step["type"] == "Precompiled":
            vocabulary.more["precompiled_charsmap"] = _charsmap(step, path)
        elif step["type"] == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif step["type"] == "Replace" and pattern == {"String": " "} and step.get("content") == SPACE:
            escapes = True
        elif unigram and step["type"] == "Replace" and " {2,}" in str(pattern):
            joins = True
        else:
            others.append(step)
    cuts: list[_Step] = []
    for step in steps(data.get("pre_tokenizer"), path):
        if step["type"] == "Metaspace":
            scheme = str(step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never"))
            prefix, escapes = scheme in ("first", "always"), True
            if prefix:
                vocabulary.more["metaspace"] = scheme
            if not unigram and step.get("split", True) and any(SPACE in token[1:] for token in vocabulary.tokens):
                cut = {"type": "Split", "pattern": {"String": SPACE}, "behavior": "MergedWithNext", "invert": False}
                cuts.append(cut)
        elif unigram and step["type"] == "WhitespaceSplit":
            joins = True
        elif not (escapes and step["type"] == "Split" and step.get("pattern") == {"String": " "}):  # none is left
            cuts.append(step)
    if joins:  # which strips the text, too
        others = [step for step in others if step["type"] != "Strip"]
    if unigram:
        vocabulary.more["remove_extra_whitespaces"] = joins
    if not escapes:
        vocabulary.more["escape_whitespaces"] = False
    vocabulary.more["add_space_prefix"] = prefix
    keep_steps(vocabulary, "normalizer", others, path)
    keep_steps(vocabulary, "pre_tokenizer", cuts, path)


def read_word_steps(data: _Step, vocabulary: Vocabulary, path: Path) -> None:
    """Find out how WordPiece prepares a text: as BERT does, or otherwise."""
    found = list(steps(data.get("normalizer"), path))
    bert = next((step for step in found if step["type"] == "BertNormalizer"), {})
    types = {step["type"] for step in found}
    lowercase = bert.get("lowercase", True) is True if bert else "Lowercase" in types
    strip = bert.get("strip_accents") if bert else "StripAccents" in types
    vocabulary.more["normalizer.lowercase"] = lowercase
    vocabulary.more["normalizer.strip_accents"] = lowercase if strip is None else strip is True
    if not (found == [bert] and all(bert.get(flag, True) is True for flag in ("clean_text", "handle_chinese_chars"))):
        keep_steps(vocabulary, "normalizer", found, path, replace=True)
    cuts = list(steps(data.get("pre_tokenizer"), path))
    if [step["type"] for step in cuts] != ["BertPreTokenizer"]:
        keep_steps(vocabulary, "pre_tokenizer", cuts, path, replace=True)


def read_post_processor(data: _Step, vocabulary: Vocabulary, path: Path) -> None:
    """Find the tokens that the post-processor puts around a text."""
    found = list(steps(data.get("post_processor"), path))
    if found:
        vocabulary.more = {"add_bos_token": False, "add_eos_token": False} | vocabulary.more
    for step in found:
        for role, tokens in _tokens_around(step).items():
            vocabulary.more[f"add_{role}_token"] = bool(tokens)
            if tokens:
                vocabulary.roles[role] = tokens[0 if role == "bos" else -1]
            if len(tokens) > 1:
                _keep_around(role, tokens, vocabulary, path)


def _keep_around(role: str, tokens: list[str], vocabulary: Vocabulary, path: Path) -> None:
    """Keep several tokens that stand before a text. Several ones behind it have no place."""
    names = " ".join(tokens)[:80]
    if role == "bos" and all(token in vocabulary.tokens for token in tokens):
        vocabulary.more["bos_token_ids"] = np.array([vocabulary.tokens.index(token) for token in tokens], np.int32)
        warn(path, f"it puts {names} before a text: llama.cpp puts the first of them only")
    else:
        warn(path, f"it puts {names} around a text: a GGUF file says one token, put the others into your texts")


def _tokens_around(step: _Step) -> dict[str, list[str]]:
    """Return the tokens that a step puts before a text (bos) and behind it (eos). No key: the step puts none."""
    if step["type"] in ("RobertaProcessing", "BertProcessing"):
        pairs = (("bos", step.get("cls")), ("eos", step.get("sep")))
        return {role: [pair[0]] for role, pair in pairs if isinstance(pair, list) and pair and isinstance(pair[0], str)}
    single = step.get("single") if step["type"] == "TemplateProcessing" else None
    if not isinstance(single, list):
        return {}
    names = [text_of(part.get("SpecialToken"), "id") if isinstance(part, dict) else None for part in single]
    at = next((i for i, part in enumerate(single) if isinstance(part, dict) and "Sequence" in part), len(single))
    return {role: [name for name in part if name is not None]
            for role, part in (("bos", names[:at]), ("eos", names[at + 1 :]))}  # fmt: skip


def _charsmap(step: _Step, path: Path) -> Any:
    try:
        return np.frombuffer(base64.b64decode(step["precompiled_charsmap"], validate=True), np.uint8)
    except (KeyError, TypeError, ValueError):
        raise FormatError(f"{path}: precompiled_charsmap is no base64") from None
