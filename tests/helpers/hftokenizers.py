"""Tokenizers as Hugging Face checkpoints hold them, trained on a few texts, and awkward texts to try them on."""

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

# Expressions as published tokenizer.json files have them.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
LLAMA3 = rf"{_END[:-1]}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL.replace('/', '')}"
QWEN2 = LLAMA3.replace("{1,3}", "")
O200K = rf"{_LEAD}{_UPPER}*{_LOWER}+{_END}|{_LEAD}{_UPPER}+{_LOWER}*{_END}|\p{{N}}{{1,3}}|{_TAIL}"
TEKKEN = rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_TAIL}"
_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
DEEPSEEK3 = (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _PUNCTUATION + r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")

_TEXT = """
the of and to in that was his with for which this from they were have one would there their what been when who
will more if out so said about into them can only other time new some could these two may then do first any my
now such like our over man me even most made after also did many before must through back years where much your
way well down should because each just those people how too little state good very make world still own see men
work long get here between both life being under never day same another know while last might us great old year
off come since against go came right used take three Überraschung naïve café façade Привет мир привет как дела
Москва русский язык Ελληνικά γλώσσα 日本語 日本 東京 中文 我们 中国 的 是 在 한국어 안녕하세요 हिन्दी नमस्ते
العربية سلام עברית שלום ไทย ภาษา Việt Nam tiếng def return class import self print lambda function const while
for if else True None 1234 2024 3.14 0x1F 100% $5.00 don't I'll they're we've he'd it's can't I'm HTTPServer
camelCase snake_case kebab-case user@example.com https://x.org/a 😀 🚀 👨\u200d👩\u200d👧 → © ½ ٣٤ e\u0301
n\u0303 … “quoted” ‘single’ — – ¿qué? ¡sí! <b> </b> {} [] () ; : , . ! ?
"""
_WORDS = _TEXT.split()
_SPACES = (" ", " ", " ", " ", " ", "  ", "\n", "\n\n", "\t", "\r\n", "    ", "", "", "\u00a0", " \n", "\n  ")


_RANGES = (
    (0x20, 0x7F), (0xA1, 0x180), (0x370, 0x530), (0x5D0, 0x650), (0x900, 0x980), (0x3040, 0x3100), (0x4E00, 0x9FA5),
    (0xAC00, 0xD7A3), (0x1F300, 0x1F64F), (0x2010, 0x2600), (0, 0x20),
)  # fmt: skip


def texts(n: int, seed: int = 1, special: tuple[str, ...] = ()) -> list[str]:
    """Return random texts: words of many scripts, code, numbers, odd spaces, random characters, some special tokens."""
    chance = random.Random(seed)
    found = []
    for _ in range(n):
        parts = []
        for _ in range(chance.randint(1, 20)):
            kind = chance.random()
            if kind < 0.75:
                word = chance.choice(_WORDS)
                parts.append(chance.choice((word, word, word.upper(), word.capitalize(), word[: chance.randint(1, 4)])))
            elif kind < 0.85:
                parts.append(str(chance.randint(0, 10 ** chance.randint(1, 9))))
            elif kind < 0.95 or not special:
                parts.append("".join(_character(chance) for _ in range(chance.randint(1, 4))))
            else:
                parts.append(chance.choice(special))
            parts.append(chance.choice(_SPACES))
        found.append("".join(parts))
    return found


def _character(chance: random.Random) -> str:
    low, high = chance.choice(_RANGES)
    return chr(chance.randint(low, high))


def _splits(*steps: str, last: Any = None) -> Any:
    splits = [pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    return pre_tokenizers.Sequence([*splits, last or pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(pre: Any, **model: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(1500, seed=2), trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return tokenizer


def around(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """Put special tokens around texts: "<s> $A"."""
    names = [name for name in template.split() if name != "$A"]
    special = [(name, tokenizer.token_to_id(name)) for name in names]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


def spm_bpe(prefix: str) -> Tokenizer:
    """Return SentencePiece's BPE as transformers writes it. All pairs that make a token are merges, in token order.

    prefix: "normalizer" (llama 2), "first", "always" (Metaspace), or "" (Gemma).
    """
    trained = Tokenizer(models.BPE(byte_fallback=True))
    trained.normalizer = normalizers.Replace(" ", "▁")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=pieces, show_progress=False, limit_alphabet=200)
    words = [f"▁{word}" for text in texts(600, seed=3) for word in text.split()]
    trained.train_from_iterator(words, trainer)
    vocab = trained.get_vocab()
    by_id = sorted(vocab, key=vocab.__getitem__)
    inner = [token for token in by_id[259:] if len(token) > 1]
    merges = [(t[:i], t[i:]) for t in inner for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    replace = normalizers.Replace(" ", "▁")
    if prefix in ("first", "always"):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return around(tokenizer, "<s> $A")


def unigram(*, joins_spaces: bool = True, byte_fallback: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always")
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    tokenizer.pre_tokenizer = split if joins_spaces else metaspace
    tokenizer.normalizer = normalizers.NFKC()
    special = ["<pad>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256) if byte_fallback)]
    trainer = trainers.UnigramTrainer(vocab_size=900, special_tokens=special, unk_token="<unk>", show_progress=False)
    chance = random.Random(4)
    tokenizer.train_from_iterator([" ".join(chance.choices(_WORDS, k=12)) for _ in range(2000)], trainer)
    data = json.loads(tokenizer.to_str())
    data["model"]["byte_fallback"] = byte_fallback
    data["model"]["vocab"] = [[token, float(np.float32(score))] for token, score in data["model"]["vocab"]]
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    return around(Tokenizer.from_str(json.dumps(data)), "$A </s>")


def wordpiece(*, lowercase: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts(600, seed=5), trainer)
    return around(tokenizer, "[CLS] $A [SEP]")


_DIGITS = pre_tokenizers.Digits(individual_digits=True)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)

# name -> how to make it, and the model and pre-tokenizer that a GGUF file names.
KINDS: dict[str, tuple[Callable[[], Tokenizer], str, str]] = {
    "gpt-2": (lambda: byte_level(_GPT2), "gpt2", "gpt-2"),
    "smollm": (lambda: byte_level(pre_tokenizers.Sequence([_DIGITS, _GPT2])), "gpt2", "smollm"),
    "llama-3": (lambda: around(byte_level(_splits(LLAMA3), ignore_merges=True), "<|im_end|> $A"), "gpt2", "llama-bpe"),
    "olmo-2": (lambda: byte_level(_splits(LLAMA3)), "gpt2", "dbrx"),
    "qwen-2": (lambda: _composed(byte_level(_splits(QWEN2))), "gpt2", "qwen2"),
    "gpt-oss": (lambda: byte_level(_splits(O200K)), "gpt2", "gpt-4o"),
    "tekken": (lambda: byte_level(_splits(TEKKEN), ignore_merges=True), "gpt2", "tekken"),
    "deepseek-3": (lambda: byte_level(_splits(*DEEPSEEK3)), "gpt2", "deepseek-v3"),
    "deepseek-coder": (lambda: byte_level(_splits(*DEEPSEEK_CODER, last=_digits())), "gpt2", "deepseek-coder"),
    "llama-2": (lambda: spm_bpe("normalizer"), "llama", "default"),
    "phi-3": (lambda: _stripping(spm_bpe("normalizer")), "llama", "default"),
    "mistral-0.3": (lambda: spm_bpe("first"), "llama", "default"),
    "metaspace": (lambda: spm_bpe("always"), "llama", "default"),
    "gemma": (lambda: spm_bpe(""), "llama", "default"),
    "t5": (unigram, "t5", "default"),
    "unigram-spaces": (lambda: unigram(joins_spaces=False, byte_fallback=True), "t5", "default"),
    "bert": (wordpiece, "bert", "default"),
    "bert-cased": (lambda: wordpiece(lowercase=False), "bert", "default"),
}  # fmt: skip


def _composed(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _stripping(tokenizer: Tokenizer) -> Tokenizer:
    """Add tokens that remove the white space beside them."""
    tokenizer.add_tokens([AddedToken("<|user|>", special=True, normalized=False, rstrip=True)])
    tokenizer.add_tokens([AddedToken("<left>", special=False, normalized=False, lstrip=True)])
    return tokenizer


def _digits() -> Any:
    return pre_tokenizers.Sequence([_DIGITS, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def special_names(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The texts of added tokens."""
    return tuple(token.content for token in tokenizer.get_added_tokens_decoder().values())


@functools.cache
def trained(kind: str) -> str:
    """The tokenizer.json of a kind, trained once per test run."""
    return KINDS[kind][0]().to_str()


def write(directory: Path, kind: str, **config: Any) -> Tokenizer:
    """Write tokenizer.json and tokenizer_config.json into a directory and return the tokenizer."""
    (directory / "tokenizer.json").write_text(trained(kind))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_str(trained(kind))
