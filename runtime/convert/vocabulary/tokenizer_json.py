"""tokenizer.json of the tokenizers package: byte-level BPE, SentencePiece as BPE or Unigram, and WordPiece."""

import base64
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.runtime.convert.stored.checkpoint import read_json
from gguf_run.runtime.convert.vocabulary.pre_tokenizer import pre_tokenizer_name
from gguf_run.runtime.convert.vocabulary.vocabulary import (
    PADDING_SCORE,
    SPACE,
    Vocabulary,
    added_tokens,
    lay_out,
    mark_added,
    pairs_of,
    text_of,
    tokens_by_id,
    warn,
)
from gguf_run.runtime.tokenizers.vocab import BYTE, NORMAL, UNKNOWN

_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def read_tokenizer_json(path: Path, n_vocab: int | None, model_type: str) -> Vocabulary:
    """Return the vocabulary of a tokenizer.json.

    n_vocab: tokens are added or cut to make so many; None: as many as the file has. model_type: of config.json.

    FormatError for a damaged file. UnsupportedError for a kind of model or step that GGUF has no place for.
    ConversionWarning if GGUF has no place for a step that changes some texts.
    """
    data = read_json(path)
    model = data.get("model")
    if not isinstance(model, dict):
        raise FormatError(f"{path}: there is no model in it")
    kind = model.get("type", "BPE" if "merges" in model else None)
    if not isinstance(kind, str) or kind not in _READERS:
        raise UnsupportedError(f"{path}: the model is {str(kind)[:40]!r}: {', '.join(_READERS)} are supported")
    added = added_tokens(data.get("added_tokens"), path)
    vocab: Any = model.get("vocab")
    if kind == "Unigram":
        _check_pieces(vocab, path)
        vocab = {token: id for id, (token, _) in enumerate(vocab)}
    if not isinstance(vocab, dict):
        raise FormatError(f"{path}: the model's vocab must be an object of tokens and ids")
    found = tokens_by_id(vocab, added, path)
    tokens, types = lay_out(found, n_vocab or max(found) + 1, path)
    vocabulary = _READERS[kind](data, Vocabulary("", "default", tokens, types), path, model_type)
    mark_added(vocabulary, added)
    unknown = model.get("unk_token")
    if isinstance(unknown, str) and vocab.get(unknown, len(tokens)) < len(tokens):
        vocabulary.roles.setdefault("unk", vocab[unknown])
    _read_post_processor(data, vocabulary, path)
    return vocabulary


def steps(component: Any, path: Path) -> Iterator[dict[str, Any]]:
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


def _bpe(data: dict[str, Any], vocabulary: Vocabulary, path: Path, model_type: str) -> Vocabulary:
    model = data["model"]
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UnsupportedError(f"{path}: BPE with {name} {str(model[name])[:20]!r} has no place in GGUF")
    merges = _merges(model.get("merges"), path)
    types = {step["type"] for part in ("pre_tokenizer", "decoder") for step in steps(data.get(part), path)}
    if "ByteLevel" not in types:
        return _spm_bpe(data, vocabulary, merges, path)
    vocabulary.model = "gpt2"
    pre = data.get("pre_tokenizer")
    if any(step.get("add_prefix_space") for step in steps(pre, path) if step["type"] == "ByteLevel"):
        warn(path, "it puts a space before a text, which a GGUF file cannot say of byte-level BPE")
    vocabulary.pre = pre_tokenizer_name(pre, model.get("ignore_merges") is True, model_type, path)
    vocabulary.merges = [f"{left} {right}" for left, right in merges]
    for step in steps(data.get("normalizer"), path):
        if step["type"] == "NFC":
            vocabulary.more["normalizer.nfc"] = True
        else:
            warn(path, f"its normalizer {step['type']} has no place in a GGUF file")
    return vocabulary


def _spm_bpe(data: dict[str, Any], vocabulary: Vocabulary, merges: list[tuple[str, str]], path: Path) -> Vocabulary:
    """Compute scores from the order of the merges: the model is one of SentencePiece that was written as BPE.

    SentencePiece joins any two tokens that make a token, the best score first. BPE does the same if its merges name
    all such pairs.
    """
    vocabulary.model = "llama"
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys(left + right for left, right in merges))}
    known = dict.fromkeys(vocabulary.tokens, 0)
    n_pairs = sum(len(pairs_of(token, known)) for token in ranks)
    n_merges = len(set(merges))
    if n_pairs > n_merges:
        warn(path, f"it has {n_merges} of {n_pairs} possible merges; a GGUF file has all: some texts may differ")
    _mark_bytes(vocabulary)
    for token, type in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if type == NORMAL:
            ranks.setdefault(token, len(ranks))
    vocabulary.scores = [-float(ranks.get(token, 0)) for token in vocabulary.tokens]
    _read_prefix(data, vocabulary, path)
    return vocabulary


def _unigram(data: dict[str, Any], vocabulary: Vocabulary, path: Path, model_type: str) -> Vocabulary:
    vocabulary.model = "t5"
    scores = [float(score) for _, score in data["model"]["vocab"]][: len(vocabulary.tokens)]
    vocabulary.scores = scores + [PADDING_SCORE] * (len(vocabulary.tokens) - len(scores))
    unknown = data["model"].get("unk_id")
    if isinstance(unknown, int) and 0 <= unknown < len(vocabulary.tokens):
        vocabulary.types[unknown] = UNKNOWN
        vocabulary.roles["unk"] = unknown
    if data["model"].get("byte_fallback"):
        _mark_bytes(vocabulary)
    _read_prefix(data, vocabulary, path)
    split = any(step["type"] == "WhitespaceSplit" for step in steps(data.get("pre_tokenizer"), path))
    for step in steps(data.get("normalizer"), path):
        if step["type"] == "Precompiled":
            try:
                charsmap = base64.b64decode(step["precompiled_charsmap"], validate=True)
            except (KeyError, TypeError, ValueError):
                raise FormatError(f"{path}: precompiled_charsmap is no base64") from None
            vocabulary.more["precompiled_charsmap"] = np.frombuffer(charsmap, np.uint8)
        elif step["type"] == "Replace" and " {2,}" in str(step.get("pattern")):
            split = True
        elif step["type"] in ("NFC", "NFKC"):
            vocabulary.more[f"normalizer.{step['type'].lower()}"] = True
        elif step["type"] not in ("Replace", "Prepend", "Strip"):
            warn(path, f"its normalizer {step['type']} has no place in a GGUF file")
    vocabulary.more["remove_extra_whitespaces"] = split
    return vocabulary


def _wordpiece(data: dict[str, Any], vocabulary: Vocabulary, path: Path, model_type: str) -> Vocabulary:
    """Put "▁" before tokens that begin a word and remove "##" from the others, as llama.cpp's converter does."""
    vocabulary.model = "bert"
    prefix = str(data["model"].get("continuing_subword_prefix", "##"))
    added = {entry.id for entry in added_tokens(data.get("added_tokens"), path)}
    vocabulary.tokens = [
        token if id in added or type != NORMAL
        else token.removeprefix(prefix) if token.startswith(prefix) and token != prefix
        else SPACE + token
        for id, (token, type) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
    ]  # fmt: skip
    for step in steps(data.get("normalizer"), path):
        if step["type"] in ("BertNormalizer", "Lowercase"):
            lowercase = step.get("lowercase", True) is True
            strip = step.get("strip_accents")
            vocabulary.more["normalizer.lowercase"] = lowercase
            vocabulary.more["normalizer.strip_accents"] = lowercase if strip is None else strip is True
    return vocabulary


_READERS: Mapping[str, Callable[[dict[str, Any], Vocabulary, Path, str], Vocabulary]] = {
    "BPE": _bpe,
    "Unigram": _unigram,
    "WordPiece": _wordpiece,
}


def _merges(value: Any, path: Path) -> list[tuple[str, str]]:
    """Return merges as pairs. A file has "left right", or ["left", "right"], whose parts may hold spaces."""
    if not isinstance(value, list) or not value:
        raise FormatError(f"{path}: the model has no merges")
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else merge for merge in value]
    for i, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise FormatError(f'{path}: merge {i} is {str(value[i])[:60]}, not "left right"')
    return [(left.replace(" ", "Ġ"), right.replace(" ", "Ġ")) for left, right in pairs]


def _check_pieces(value: Any, path: Path) -> None:
    """Raise FormatError unless this is the vocabulary of a Unigram model: [[token, log probability], ...]."""
    if not isinstance(value, list):
        raise FormatError(f"{path}: the model's vocab must be a list of tokens and scores")
    for i, item in enumerate(value):
        if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], str):
            raise FormatError(f"{path}: entry {i} of the vocabulary is {str(item)[:60]}, not [token, score]")
        if type(item[1]) not in (int, float) or not -1e30 < item[1] < 1e30:
            raise FormatError(f"{path}: token {item[0][:40]!r} has the score {str(item[1])[:40]}, which is no number")
    twice, n = Counter(item[0] for item in value).most_common(1)[0] if value else ("", 0)
    if n > 1:
        raise FormatError(f"{path}: token {twice[:40]!r} stands there twice")


def _mark_bytes(vocabulary: Vocabulary) -> None:
    typed = zip(vocabulary.tokens, vocabulary.types, strict=True)
    vocabulary.types = [BYTE if token in _BYTE_TOKENS else type for token, type in typed]


def _read_prefix(data: dict[str, Any], vocabulary: Vocabulary, path: Path) -> None:
    """Find out whether a text gets a space in front: from the normalizer, or from Metaspace (if it has none)."""
    prefix = any(step["type"] == "Prepend" for step in steps(data.get("normalizer"), path))
    for step in steps(data.get("pre_tokenizer"), path):
        if step["type"] == "Metaspace":
            scheme = str(step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never"))
            prefix = scheme in ("first", "always")
            if prefix:
                vocabulary.more["metaspace"] = scheme
    vocabulary.more["add_space_prefix"] = prefix


def _read_post_processor(data: dict[str, Any], vocabulary: Vocabulary, path: Path) -> None:
    """Find the tokens that the post-processor puts around a text."""
    for step in steps(data.get("post_processor"), path):
        if step["type"] == "ByteLevel":
            vocabulary.more = {"add_bos_token": False, "add_eos_token": False} | vocabulary.more
        for role, token in _tokens_around(step).items():
            vocabulary.more[f"add_{role}_token"] = token is not None
            if token is not None:
                vocabulary.roles[role] = token


def _tokens_around(step: dict[str, Any]) -> dict[str, str | None]:
    """Return the tokens that a step puts before (bos) and after (eos) a text. None: no token. No key: not known."""
    if step["type"] in ("RobertaProcessing", "BertProcessing"):
        pairs = (("bos", step.get("cls")), ("eos", step.get("sep")))
        return {role: pair[0] for role, pair in pairs if isinstance(pair, list) and pair and isinstance(pair[0], str)}
    single = step.get("single") if step["type"] == "TemplateProcessing" else None
    if not isinstance(single, list) or len(single) < 2:
        return {}
    return {"bos": _special_token(single[0]), "eos": _special_token(single[-1])}


def _special_token(part: Any) -> str | None:
    special = part.get("SpecialToken") if isinstance(part, dict) else None
    return text_of(special, "id")
