"""The tokenizer in a GGUF file as tokenizer.json and tokenizer_config.json of a Hugging Face checkpoint."""

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gguf_run.formats.errors import UnsupportedError
from gguf_run.runtime.convert.vocabulary.vocabulary import SPACE, pairs_of
from gguf_run.runtime.tokenizers import spm, unigram, wordpiece
from gguf_run.runtime.tokenizers.pretokenizers import pre_tokenizer
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer
from gguf_run.runtime.tokenizers.vocab import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Defaults,
    Vocab,
    read_flags,
    read_numbers,
    read_strings,
    read_vocab,
)  # fmt: skip

Json = dict[str, Any]
_PREFIX = "tokenizer.ggml."
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_DECODE = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, Json]:
    """Return the contents of tokenizer.json and tokenizer_config.json. They give the ids that this program gives.

    Errors are those of Tokenizer.from_metadata.
    """
    tokenizer = Tokenizer.from_metadata(metadata)  # checks all there is
    defaults, model = _KINDS[metadata[f"{_PREFIX}model"]]
    vocab = read_vocab(metadata, defaults)
    ids = {"bos": vocab.bos, "eos": vocab.eos, "unk": vocab.unknown}
    for role, key in (("pad", "padding"), ("sep", "seperator"), ("cls", "cls"), ("mask", "mask")):
        ids[role] = metadata.get(f"{_PREFIX}{key}_token_id")
    names = {role: _name(vocab, id) for role, id in ids.items()}
    flags = read_flags(metadata, vocab)
    added = [
        {
            "id": id, "content": vocab.tokens[id], "single_word": id in flags.single_word, "normalized": False,
            "lstrip": id in flags.left, "rstrip": id in flags.right, "special": vocab.types[id] != USER_DEFINED,
        }
        for id in vocab.of_type(CONTROL, UNKNOWN, USER_DEFINED)
    ]  # fmt: skip
    data = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **model(vocab, metadata)}
    before = [vocab.tokens[id] for id in vocab.before] if tokenizer.add_bos else []
    after = [vocab.tokens[vocab.eos]] if tokenizer.add_eos and vocab.eos is not None else []
    if before or after:
        data["post_processor"] = _template(before, after, vocab)
    settings: Json = {f"{role}_token": name for role, name in names.items() if name is not None}
    settings |= {"add_bos_token": tokenizer.add_bos, "add_eos_token": tokenizer.add_eos}
    settings |= {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    template = _chat_template(metadata)
    if template:
        settings["chat_template"] = template
    return {"tokenizer.json": data, "tokenizer_config.json": settings}


def _name(vocab: Vocab, id: Any) -> str | None:
    return vocab.tokens[id] if isinstance(id, int) and 0 <= id < len(vocab.tokens) else None


def _chat_template(metadata: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """Return the template, or a list of names and texts if there are several."""
    key = "tokenizer.chat_template"
    default = metadata.get(key)
    named = {name.removeprefix(f"{key}."): text for name, text in metadata.items() if name.startswith(f"{key}.")}
    if not named:
        return default if isinstance(default, str) else None
    named = {"default": default} | named if isinstance(default, str) else named
    return [{"name": name, "template": text} for name, text in named.items() if isinstance(text, str)]


def _template(before: list[str], after: list[str], vocab: Vocab) -> Json:
    def sequence(name: str, part: int) -> list[Json]:
        items = (*(("SpecialToken", id) for id in before), ("Sequence", name), *(("SpecialToken", id) for id in after))
        return [{kind: {"id": id, "type_id": part}} for kind, id in items]

    special = {name: {"id": name, "ids": [vocab.ids[name]], "tokens": [name]} for name in (*before, *after)}
    pair = [*sequence("A", 0), *sequence("B", 1)]
    return {"type": "TemplateProcessing", "single": sequence("A", 0), "pair": pair, "special_tokens": special}


def _kept(metadata: Mapping[str, Any], kind: str) -> list[Json] | None:
    """Return the steps that gguf-convert has kept as they were. kind: "normalizer" or "pre_tokenizer"."""
    text = metadata.get(f"{_PREFIX}{kind}.json")
    return None if text is None else json.loads(text)


def _normalizers(metadata: Mapping[str, Any]) -> list[Json]:
    """Return the steps that replace characters, without those for spaces."""
    steps = _kept(metadata, "normalizer")
    if steps is None:
        steps = [{"type": name} for name in ("NFC", "NFKC") if metadata.get(f"{_PREFIX}normalizer.{name.lower()}")]
    charsmap = metadata.get(f"{_PREFIX}precompiled_charsmap")
    if charsmap is not None:
        text = base64.b64encode(np.asarray(charsmap).tobytes()).decode()
        steps = [*steps, {"type": "Precompiled", "precompiled_charsmap": text}]
    return steps


def _sequence(kind: str, steps: list[Json]) -> Json | None:
    return {"type": "Sequence", kind: steps} if steps else None


def _entries(vocab: Vocab) -> dict[str, int]:
    """Return the ids of all tokens, without those that only fill the vocabulary up."""
    return {token: id for id, token in enumerate(vocab.tokens) if vocab.types[id] != UNUSED}


def _bpe(model: Json, entries: dict[str, int], merges: list[list[str]], unknown: str | None, by_bytes: bool) -> Json:
    return {
        "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": by_bytes, "byte_fallback": by_bytes, "ignore_merges": False,
        "vocab": entries, "merges": merges, **model,
    }  # fmt: skip


def _gpt2(vocab: Vocab, metadata: Mapping[str, Any]) -> Json:
    written = read_strings(metadata, "merges")
    pre = pre_tokenizer(metadata.get(f"{_PREFIX}pre"), written)
    entries = _entries(vocab)
    pairs = (merge.split(" ") for merge in written)
    merges = [pair for pair in pairs if pair[0] in entries and pair[1] in entries and "".join(pair) in entries]
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    splits = [{**split, "pattern": {"Regex": step}} for step in pre.steps]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    whole_words = bool(metadata.get(f"{_PREFIX}ignore_merges", pre.whole_words))
    return {
        "normalizer": _sequence("normalizers", _normalizers(metadata)),
        "pre_tokenizer": _sequence("pretokenizers", _kept(metadata, "pre_tokenizer") or [*splits, byte_level]),
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": _bpe({"ignore_merges": whole_words}, entries, merges, None, False),
    }


def _llama(vocab: Vocab, metadata: Mapping[str, Any]) -> Json:
    """Return merges for SentencePiece's BPE, which joins any two tokens that give a token, the best score first."""
    scores = read_numbers(metadata, "scores", len(vocab.tokens))
    assert scores is not None  # Tokenizer has seen to it
    entries = _entries(vocab)
    usual = [id for id in np.argsort(-scores, kind="stable").tolist() if vocab.types[id] in (NORMAL, USER_DEFINED)]
    merges = [list(pair) for id in usual for pair in pairs_of(vocab.tokens[id], entries)]
    prefix = bool(metadata.get(f"{_PREFIX}add_space_prefix", True))
    scheme = metadata.get(f"{_PREFIX}metaspace") if prefix else None
    if metadata.get(f"{_PREFIX}treat_whitespace_as_suffix"):
        raise UnsupportedError("treat_whitespace_as_suffix: a tokenizer.json has no place for it")
    steps = _normalizers(metadata)
    if metadata.get(f"{_PREFIX}remove_extra_whitespaces"):
        several = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
        steps += [several, {"type": "Replace", "pattern": {"Regex": "^ | $"}, "content": ""}]
    if scheme is None:
        steps += [{"type": "Prepend", "prepend": SPACE}] if prefix else []
        steps += [_REPLACE] if metadata.get(f"{_PREFIX}escape_whitespaces", True) else []
    cuts = [_metaspace(scheme, False)] if scheme else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = _name(vocab, vocab.unknown)
    return {
        "normalizer": _sequence("normalizers", steps),
        "pre_tokenizer": _sequence("pretokenizers", [*cuts, *(_kept(metadata, "pre_tokenizer") or [])]),
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [_DECODE, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": _bpe({}, entries, merges, unknown, True),
    }


def _t5(vocab: Vocab, metadata: Mapping[str, Any]) -> Json:
    scores = read_numbers(metadata, "scores", len(vocab.tokens))
    assert scores is not None
    prefix = bool(metadata.get(f"{_PREFIX}add_space_prefix", True))
    joined = bool(metadata.get(f"{_PREFIX}remove_extra_whitespaces", True))
    metaspace = _metaspace("always" if prefix or joined else "never", True)
    words = [{"type": "WhitespaceSplit"}] if joined else []
    types = np.frombuffer(vocab.types, np.uint8)
    usual = np.isin(types, (NORMAL, BYTE))
    filler = np.where(types == UNUSED, scores[usual].min(initial=0.0), 0.0)
    used = vocab.tokens[: int(np.flatnonzero(types != UNUSED)[-1]) + 1]
    pieces = [list(pair) for pair in zip(used, np.where(usual, scores, filler).tolist(), strict=False)]
    return {
        "normalizer": _sequence("normalizers", _normalizers(metadata)),
        "pre_tokenizer": _sequence("pretokenizers", [*words, metaspace, *(_kept(metadata, "pre_tokenizer") or [])]),
        "post_processor": None,
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": vocab.unknown, "vocab": pieces, "byte_fallback": BYTE in vocab.types},
    }


def _bert(vocab: Vocab, metadata: Mapping[str, Any]) -> Json:
    lowercase = bool(metadata.get(f"{_PREFIX}normalizer.lowercase", True))
    entries: dict[str, int] = {}
    for token, id in _entries(vocab).items():
        inner = token.removeprefix(SPACE) if token.startswith(SPACE) and token != SPACE else f"##{token}"
        entries[inner if vocab.types[id] == NORMAL else token] = id
    normalizer = {
        "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": lowercase,
        "strip_accents": bool(metadata.get(f"{_PREFIX}normalizer.strip_accents", lowercase)),
    }  # fmt: skip
    steps, cuts = _kept(metadata, "normalizer"), _kept(metadata, "pre_tokenizer")
    return {
        "normalizer": normalizer if steps is None else _sequence("normalizers", steps),
        "pre_tokenizer": {"type": "BertPreTokenizer"} if cuts is None else _sequence("pretokenizers", cuts),
        "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": _name(vocab, vocab.unknown), "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": entries,
        },
    }  # fmt: skip


def _metaspace(scheme: str, split: bool) -> Json:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": split}


_KINDS: Mapping[str, tuple[Defaults, Callable[[Vocab, Mapping[str, Any]], Json]]] = {
    "gpt2": (Defaults(), _gpt2),
    "llama": (spm.DEFAULTS, _llama),
    "t5": (unigram.DEFAULTS, _t5),
    "bert": (wordpiece.DEFAULTS, _bert),
}
