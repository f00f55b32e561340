"""Finds the name in `tokenizer.ggml.pre` for the pre-tokenizer of a tokenizer.json, by what it does to texts.

Regular expressions that cut alike can be written in many ways, and a file's hash changes when a fine-tuned model adds
two tokens. So the checkpoint's pre-tokenizer and each known one cut the same awkward texts, and the cuts decide.
"""

import functools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import PreTokenizer as Cutter

from gguf_run.formats.errors import FormatError
from gguf_run.runtime.convert.vocabulary.vocabulary import warn
from gguf_run.runtime.tokenizers.pretokenizers import PRE_TOKENIZERS, TABLE
from gguf_run.runtime.tokenizers.steps import build_step

# Names that llama.cpp's converter gives to models of these types, where several names mean the same cuts.
_USUAL_NAMES = {"starcoder2": "starcoder", "granite": "refact", "stablelm": "stablelm2"}

# What the known expressions tell apart: case, contractions, digits, spaces, line ends, marks, scripts, symbols.
_PIECES = (
    "a", "the", "of", "B", "API", "É", "ßz", "camelCase", "HTTPServer", "'s", "'T", "'ll", "'RE", "don't", "'x",
    "1", "12", "1234", "1234567", "2024", "3.14", "٣٤", "½", " ", " ", " ", " ", "  ", "     ", "\t", "\n",
    "\n\n", "\r\n", " \n", "\n  ", ".", ",", "!?", "...", "-", "--", "_", "/", "//", "\\", "(", ")", "();", "{",
    "}", "$", "+", "=", "==", "<", ">", "^", "~", "|", "`", "#", "@", "*", "&", "%", '"', ":", ";", "[", "]",
    "。", "，", "“", "”", "…", "日本", "中文字", "ひらが", "カタ", "한국어", "ไทย", "नमस्ते", "سلام", "שלום",
    "Привет", "мир", "Ελλ", "Հայ", "ქარ", "e\u0301", "ο\u0308", "😀", "👨\u200d👩", "€", "→", "©", "\u00a0",
    "\u3000", "\ue000", "\x00", "\x1b", "IMGIMGAAZ", "<sentinel:1>", " a", " B", " 12", " !", " 日", "\na",
    "\n1",
)  # fmt: skip


def pre_tokenizer_name(pre: Any, whole_words: bool, model_type: str, path: Path) -> tuple[str, bool]:
    """Return the name for the `pre_tokenizer` of a tokenizer.json, and whether it cuts all test texts alike.

    pre: None, or an object with a type. whole_words: ignore_merges of its model, which decides between names with the
    same cuts. model_type: of config.json; it decides between names that mean the same in every respect.

    ConversionWarning if no known name cuts alike: the name with the fewest other cuts is returned. FormatError if the
    tokenizers package refuses `pre`.
    """
    own = _own_cuts(_cutter(pre, path), path)
    first = [names.split()[0] for names, _ in TABLE]
    least, names = 0, [name for name in first if _differences(own, name, 0) == 0]
    if not names:
        wrong = {name: _differences(own, name, len(own)) for name in first}
        least = min(wrong.values())
        names = [name for name, n in wrong.items() if n == least]
    names = [name for name in names if PRE_TOKENIZERS[name].whole_words == whole_words] or names
    row = [name for name, known in PRE_TOKENIZERS.items() if known is PRE_TOKENIZERS[names[0]]]
    usual = _USUAL_NAMES.get(model_type)
    name = usual if usual in row else names[0]
    if least:
        nearest = f'"{name}" comes nearest, with {least} of {len(probes())} test texts cut otherwise'
        warn(path, f"no known pre-tokenizer cuts text as this one does; {nearest}. llama.cpp takes that one")
    return name, not least


@functools.cache
def probes() -> tuple[str, ...]:
    """Return the texts to cut. They are the same in each run."""
    chance = random.Random(8)
    texts = ["".join(chance.choices(_PIECES, k=chance.randint(2, 14))) for _ in range(400)]
    return (*texts, "x" + " " * 700 + "y" + " " * 9 + "\n" * 5, "12345678 " * 3, "a1b2c3 " * 4)


def _own_cuts(cutter: Cutter, path: Path) -> list[list[tuple[int, int]]]:
    try:
        return [_cut(cutter, text) for text in probes()]
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the package raises it and does not export its class
            raise
        raise FormatError(f"{path}: pre_tokenizer fails ({error}): it takes too long for some texts") from None


def _cut(cutter: Cutter, text: str) -> list[tuple[int, int]]:
    return [span for _, span in cutter.pre_tokenize_str(text)]


def _differences(own: Sequence[list[tuple[int, int]]], name: str, enough: int) -> int:
    """Count the probes that a known pre-tokenizer cuts otherwise. Stop above `enough`."""
    cutter = PRE_TOKENIZERS[name].build()
    n = 0
    for text, cuts in zip(probes(), own, strict=True):
        n += _cut(cutter, text) != cuts
        if n > enough:
            break
    return n


def _cutter(pre: Any, path: Path) -> Cutter:
    """Build the pre-tokenizer alone, without the space that it may put before a text."""
    if pre is None:
        raise FormatError(f"{path}: a byte-level BPE without pre_tokenizer is not supported")
    built: Cutter = build_step(_without_prefix(pre), "pre_tokenizer", str(path))
    return built


def _without_prefix(pre: Any) -> Any:
    if isinstance(pre, Mapping):
        return {key: False if key == "add_prefix_space" else _without_prefix(value) for key, value in pre.items()}
    return [_without_prefix(item) for item in pre] if isinstance(pre, list) else pre
