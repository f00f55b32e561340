"""tokenizer.json of the tokenizers package: byte-level BPE, SentencePiece as BPE or Unigram, and WordPiece."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.runtime.convert.vocabulary.pipeline import (
    keep_steps,
    read_post_processor,
    read_spaced_steps,
    read_word_steps,
    steps,
)
from gguf_run.runtime.convert.vocabulary.pre_tokenizer import pre_tokenizer_name
from gguf_run.runtime.convert.vocabulary.vocabulary import (
    PADDING_SCORE,
    SPACE,
    Vocabulary,
    added_tokens,
    lay_out,
    mark_added,
    pairs_of,
    tokens_by_id,
    warn,
)
from gguf_run.runtime.tokenizers.pretokenizers import PRE_TOKENIZERS
from gguf_run.runtime.tokenizers.vocab import BYTE, NORMAL, UNKNOWN

_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def read_tokenizer_json(data: dict[str, Any], path: Path, n_vocab: int | None, model_type: str) -> Vocabulary:
    """Return the vocabulary of a tokenizer.json.

    data: the object in the file. path: for errors.
    n_vocab: tokens are added or cut to make so many; None: as many as the file has. model_type: of config.json.

    FormatError for a damaged file. UnsupportedError for a kind of model or step that GGUF has no place for.
    ConversionWarning if GGUF has no place for a step that changes some texts.
    """
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
    read_post_processor(data, vocabulary, path)
    return vocabulary


def _bpe(data: dict[str, Any], vocabulary: Vocabulary, path: Path, model_type: str) -> Vocabulary:
    model = data["model"]
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UnsupportedError(f"{path}: BPE with {name} {str(model[name])[:20]!r} has no place in GGUF")
    merges = _merges(model.get("merges"), path)
    types = {step["type"] for part in ("pre_tokenizer", "decoder") for step in steps(data.get(part), path)}
    if "ByteLevel" not in types:
        return _spm_bpe(data, vocabulary, merges, path, model_type)
    vocabulary.model = "gpt2"
    pre = data.get("pre_tokenizer")
    cuts = list(steps(pre, path))
    whole_words = model.get("ignore_merges") is True
    vocabulary.pre, cuts_alike = pre_tokenizer_name(pre, whole_words, model_type, path)
    if not cuts_alike or any(step.get("add_prefix_space") for step in cuts if step["type"] == "ByteLevel"):
        keep_steps(vocabulary, "pre_tokenizer", cuts, path, say=cuts_alike)
    if PRE_TOKENIZERS[vocabulary.pre].whole_words != whole_words:
        vocabulary.more["ignore_merges"] = whole_words
    vocabulary.merges = [f"{left} {right}" for left, right in merges]
    keep_steps(vocabulary, "normalizer", list(steps(data.get("normalizer"), path)), path)
    return vocabulary


def _spm_bpe(
    data: dict[str, Any], vocabulary: Vocabulary, merges: list[tuple[str, str]], path: Path, model_type: str
) -> Vocabulary:
    """Compute scores from the order of the merges: the model is one of SentencePiece that was written as BPE.

    SentencePiece joins any two tokens that make a token, the best score first. BPE does the same if its merges name
    all such pairs. Gemma 4's file has the merges themselves.
    """
    if model_type.startswith("gemma4"):
        vocabulary.model = vocabulary.pre = "gemma4"
        vocabulary.merges = [f"{left} {right}" for left, right in merges]
        _mark_bytes(vocabulary)
        read_spaced_steps(data, vocabulary, path)
        return vocabulary
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
    read_spaced_steps(data, vocabulary, path)
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
    read_spaced_steps(data, vocabulary, path)
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
    read_word_steps(data, vocabulary, path)
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
