"""Compares the tokens of test texts: by the tokenizers package, as the checkpoint says, and by our own tokenizer."""

import json
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
        parts = {key: data.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer")}
        package = Package.from_str(json.dumps({"version": "1.0", **parts, "model": {**data["model"], "dropout": None}}))
        wrong = _differences(package, added, texts, ids)
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
    package: Package, added: Iterable[Added], texts: Sequence[str], ids: Sequence[list[int]]
) -> list[tuple[str, list[int], list[int]]]:
    """Return the texts whose ids differ, with both lists. ids: by our own tokenizer."""
    ids_of = {package.token_to_id(entry.content): entry.id for entry in added}  # it numbers added tokens in its own way
    found = []
    for text, ours in zip(texts, ids, strict=True):
        theirs = [ids_of.get(id, id) for id in package.encode(text, add_special_tokens=False).ids]
        if theirs != ours:
            found.append((text, theirs, ours))
    return found


def _shown(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    names = [tokenizer.token_text(id) if 0 <= id < tokenizer.n_vocab else f"id {id}" for id in ids[:_SHOWN]]
    return f"{names!r}"[:-1] + (", ...]" if len(ids) > _SHOWN else "]")
