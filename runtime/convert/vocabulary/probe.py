"""Compares the tokens of test texts: by the tokenizers package, as the checkpoint says, and by our own tokenizer.

The package takes seconds to set up a large vocabulary. So at first it gets only the tokens that can stand in the test
texts; their ids are the same. If something differs, the whole vocabulary decides.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Package

from gguf_run.runtime.convert.vocabulary.vocabulary import Added, added_tokens, warn
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

_TEXTS = (
    "Hello world! The quick brown fox (really) jumps over 13 lazy dogs.", " leading", "trailing ", "a  b   c     d  ",
    "tab\tand\nnew line\n\n\nthree\r\nwindows \n end\n", "ABC Abc aBC STRASSE Straße ΣΊΣΥΦΟΣ", "a", " ", "\n",
    "1 12 123 1234 12345678 3.14 1,000 ½ ² Ⅷ ٣٤", "ﬁ ﬂ ＡＢＣ １２３ ㎏ ™ … ‘single’ “double” — – ‑ ·",
    "e\u0301 é n\u0303 ñ Å Å \u1112\u1161\u11ab 한", "中文字符，日本語のテキスト。한국어、ｶﾀｶﾅ",
    "Привет мир שלום سلام नमस्ते ไทย", "😀 👨\u200d👩\u200d👧 ❤️ 🇩🇪", "don't I'LL we'Ve it’s",
    "def f(x):\n    return {'a': [1, 2], \"b\": x_y != 3}  # (comment)\n\tif a->b::c: pass", "\u00a0nbsp\u3000wide",
    "<b>x</b> https://x.org/?q=1&r=2 a@b.co $5.00 100% x^2 ~ `code` \\n", "zero\u200bwidth",
    "...!!!??? ---- ==== ____", "x" * 120,
)  # fmt: skip
_AROUND = ("a{}b", "a {} b", "{} x{}\n y", "A.{}")  # how added tokens stand in texts
_OF_A_KIND = 2  # added tokens with the same flags that are tried
_SHOWN = 6  # tokens


def compare_tokens(data: Mapping[str, Any], metadata: Mapping[str, Any], path: Path) -> None:
    """Give one ConversionWarning if some test texts get other tokens than by a tokenizer.json.

    data: the object in the file at `path`. metadata: what was made of it.
    Tokens around a text are left out. FormatError if our tokenizer refuses the metadata.
    """
    own = Tokenizer.from_metadata(metadata)
    added = [entry for entry in added_tokens(data.get("added_tokens"), path) if entry.id < own.n_vocab]
    texts = [*_TEXTS, *_added_texts(data, added)]
    ids = [own.encode(text, add_special=False) for text in texts]
    try:
        wrong = _differences(_reduced(data, added, texts), added, texts, ids)
        wrong = wrong and _differences(_whole(data), added, texts, ids)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        warn(path, f"the tokenizers package refuses it ({str(error)[:80]}): no test text could be compared")
        return
    if wrong:
        text, theirs, ours = wrong[0]
        at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), 0)
        tokens = f"{_shown(own, theirs[at:])} by the tokenizers package, {_shown(own, ours[at:])} by this program"
        what = f"{len(wrong)} of {len(texts)} test texts get other tokens"
        warn(path, f"{what}: {text[:60]!r} has, from token {at} on, {tokens}")


def _added_texts(data: Mapping[str, Any], added: Iterable[Added]) -> Iterator[str]:
    """Yield texts with added tokens: some of each combination of flags."""
    normalized = {entry["id"] for entry in data.get("added_tokens") or () if entry.get("normalized") is True}
    n_tried: dict[Any, int] = {}
    for entry in added:
        kind = (entry.special, entry.lstrip, entry.rstrip, entry.single_word, entry.id in normalized)
        n_tried[kind] = n_tried.get(kind, 0) + 1
        if n_tried[kind] <= _OF_A_KIND:
            yield from (around.replace("{}", entry.content) for around in _AROUND)


def _differences(
    package: tuple[Package, Sequence[int]], added: Iterable[Added], texts: Sequence[str], ids: Sequence[list[int]]
) -> list[tuple[str, list[int], list[int]]]:
    """Return the texts whose ids differ, with both lists. package: a tokenizer, and the ids in the file of its ids."""
    tokenizer, origin = package
    ids_of = {tokenizer.token_to_id(entry.content): entry.id for entry in added}
    found = []
    for text, ours in zip(texts, ids, strict=True):
        encoded = tokenizer.encode(text, add_special_tokens=False).ids
        theirs = [ids_of[id] if id in ids_of else origin[id] if origin else id for id in encoded]
        if theirs != ours:
            found.append((text, theirs, ours))
    return found


def _whole(data: Mapping[str, Any]) -> tuple[Package, Sequence[int]]:
    return _build(data, data["model"]), ()


def _build(data: Mapping[str, Any], model: Mapping[str, Any]) -> Package:
    parts = {key: data.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer")}
    return Package.from_str(json.dumps({"version": "1.0", **parts, "model": {**model, "dropout": None}}))


def _reduced(data: Mapping[str, Any], added: Sequence[Added], texts: Iterable[str]) -> tuple[Package, Sequence[int]]:
    """Return a tokenizer of the tokens that can stand in the texts, and for Unigram the ids in the file of its ids."""
    model: dict[str, Any] = dict(data["model"])
    parts = _parts(data, added, texts)
    vocab = model["vocab"]
    if isinstance(vocab, list):
        least = min(score for _, score in vocab)  # the score of unknown text follows from it
        origin = [
            id for id, (token, score) in enumerate(vocab) if id == model.get("unk_id") or score == least
            or token in parts or token.startswith("<0x")
        ]  # fmt: skip
        unknown = origin.index(model["unk_id"]) if model.get("unk_id") is not None else None
        return _build(data, model | {"vocab": [vocab[id] for id in origin], "unk_id": unknown}), origin
    prefix = str(model.get("continuing_subword_prefix") or "")
    unknown = model.get("unk_token")
    # Added tokens must be in the vocabulary, or the package gives them ids that others have.
    model["vocab"] = {entry.content: entry.id for entry in added} | {
        token: id for token, id in vocab.items()
        if token in parts or token.removeprefix(prefix) in parts or token == unknown or token.startswith("<0x")
    }  # fmt: skip
    if "merges" in model:
        merges = ((merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"])
        model["merges"] = [merge for merge, pair in merges if "".join(pair) in parts]
    return _build(data, model), ()


def _parts(data: Mapping[str, Any], added: Iterable[Added], texts: Iterable[str]) -> set[str]:
    """Return all parts of the words that texts are cut into, and more: added tokens may stand between the words."""
    tokenizer = _build({**data, "added_tokens": []}, {"type": "BPE", "vocab": {}, "merges": []})
    names = "|".join(re.escape(entry.content) for entry in added if entry.content)
    pieces = {piece for text in texts for piece in (text, *(re.split(names, text) if names else ()))}
    words = set(pieces)
    bare = {piece.strip() for piece in pieces}  # what is left beside tokens that take white space
    for piece in pieces | bare | {f"{piece} " for piece in bare} | {f" {piece}" for piece in bare}:
        text = tokenizer.normalizer.normalize_str(piece) if tokenizer.normalizer else piece
        words.add(text)
        if tokenizer.pre_tokenizer:
            words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    return {word[i:j] for word in words for i in range(len(word)) for j in range(i + 1, len(word) + 1)}


def _shown(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    names = [tokenizer.token_text(id) if 0 <= id < tokenizer.n_vocab else f"id {id}" for id in ids[:_SHOWN]]
    return f"{names!r}"[:-1] + (", ...]" if len(ids) > _SHOWN else "]")
