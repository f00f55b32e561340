"""Tiktoken's files ("base64 rank" a line) and Mistral's tekken.json: byte-level BPE whose merges follow from ranks."""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf_run.formats.errors import FormatError
from gguf_run.runtime.convert.stored.checkpoint import read_json
from gguf_run.runtime.convert.vocabulary.pipeline import keep_steps
from gguf_run.runtime.convert.vocabulary.pre_tokenizer import pre_tokenizer_name
from gguf_run.runtime.convert.vocabulary.vocabulary import (
    MAX_TOKEN_CHARS,
    MAX_TOKENS,
    Vocabulary,
    lay_out,
    pairs_of,
    read_file,
)
from gguf_run.runtime.tokenizers.merge import BYTE_CHARACTERS
from gguf_run.runtime.tokenizers.pretokenizers import PRE_TOKENIZERS
from gguf_run.runtime.tokenizers.vocab import CONTROL

_CHARACTER = {byte: character for character, byte in BYTE_CHARACTERS.items()}

_RESERVED = "<|reserved_special_token_{}|>"
_LLAMA3_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", *map(_RESERVED.format, (0, 1)), "<|finetune_right_pad_id|>",
    _RESERVED.format(2), "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
    *(_RESERVED.format(i) for i in range(3, 248)),
)  # fmt: skip

# The file does not hold the pre-tokenizer or the special tokens. The number of ranks tells which vocabulary it is.
_KNOWN: Mapping[int, tuple[str, tuple[str, ...]]] = {
    50256: ("gpt-2", ("<|endoftext|>",)),
    100256: ("dbrx", ()),
    128000: ("llama-bpe", _LLAMA3_SPECIAL),
    163584: ("kimi-k2", ()),
    151643: ("qwen2", ("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
    199998: ("gpt-4o", ()),
}

# The special tokens of the first files, which do not list them.
_TEKKEN_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "<pad>", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
)  # fmt: skip


def read_tiktoken(path: Path, n_vocab: int | None) -> Vocabulary:
    """Return the vocabulary of a tiktoken file. FormatError: a line that is not one, ranks that are not 0, 1, 2..."""
    tokens = []
    for n, line in enumerate(read_file(path).splitlines()):
        try:
            text, rank = line.split()
            tokens.append(base64.b64decode(text, validate=True))
            right = int(rank) == n
        except (ValueError, binascii.Error):
            right = False
        if not right:
            raise FormatError(f'{path}: line {n + 1} is {line[:40]!r}: "base64 {n}" must stand there')
    pre, special = _KNOWN.get(len(tokens), ("", ()))
    if not pre:
        known = ", ".join(f"{n} ({pre})" for n, (pre, _) in _KNOWN.items())
        raise FormatError(f"{path}: {len(tokens)} ranks are of no known vocabulary: {known}. Add its tokenizer.json")
    controls = {len(tokens) + i: name for i, name in enumerate(special)}
    vocabulary = _byte_level(tokens, 0, controls, n_vocab, path)
    vocabulary.pre = pre
    vocabulary.adds = ("bos",) if PRE_TOKENIZERS[pre].add_bos else ()
    for role, name in (("bos", "<|begin_of_text|>"), ("eos", "<|end_of_text|>"), ("eos", "<|endoftext|>")):
        if name in special:
            vocabulary.roles[role] = name
    return vocabulary


def read_tekken(path: Path, n_vocab: int | None) -> Vocabulary:
    """Return the vocabulary of a tekken.json: control tokens first, then the tokens with the lowest ranks."""
    data = read_json(path)
    given = data.get("config")
    config = given if isinstance(given, dict) else {}
    n_special, n_all = config.get("default_num_special_tokens"), config.get("default_vocab_size")
    pattern, entries = config.get("pattern"), data.get("vocab")
    if not (isinstance(n_special, int) and isinstance(n_all, int) and 0 <= n_special < n_all <= MAX_TOKENS):
        names = "config.default_vocab_size and .default_num_special_tokens"
        raise FormatError(f"{path}: {names} are missing or no numbers")
    if not isinstance(pattern, str) or not isinstance(entries, list) or len(entries) < n_all - n_special:
        raise FormatError(f"{path}: config.pattern is missing, or vocab has fewer than {n_all - n_special} tokens")
    try:
        tokens = [base64.b64decode(entry["token_bytes"], validate=True) for entry in entries[: n_all - n_special]]
    except (TypeError, KeyError, ValueError, binascii.Error):
        raise FormatError(f"{path}: an entry of vocab has no token_bytes in base64") from None
    controls = {id: f"<SPECIAL_{id}>" for id in range(n_special)} | _tekken_special(data, n_special, path)
    vocabulary = _byte_level(tokens, n_special, controls, n_vocab, path)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    pre = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    vocabulary.pre, cuts_alike = pre_tokenizer_name(pre, True, "mistral", path)
    if not cuts_alike:
        keep_steps(vocabulary, "pre_tokenizer", [split, byte_level], path, say=False)
    vocabulary.roles |= {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}
    vocabulary.more |= {"add_bos_token": True, "add_eos_token": False}
    return vocabulary


def _tekken_special(data: Mapping[str, Any], n: int, path: Path) -> dict[int, str]:
    entries = data.get("special_tokens")
    if entries is None:
        return dict(enumerate(_TEKKEN_SPECIAL[:n]))
    try:
        found = {entry["rank"]: entry["token_str"] for entry in entries}
    except (TypeError, KeyError):
        raise FormatError(f"{path}: an entry of special_tokens has no rank or no token_str") from None
    if not all(isinstance(id, int) and 0 <= id < n and isinstance(name, str) for id, name in found.items()):
        raise FormatError(f"{path}: special_tokens must have ranks from 0 to {n - 1} and names")
    return found


def _spell(tokens: list[bytes]) -> list[str]:
    return ["".join([_CHARACTER[byte] for byte in token]) for token in tokens]


def _byte_level(
    tokens: list[bytes], first: int, controls: dict[int, str], n_vocab: int | None, path: Path
) -> Vocabulary:
    """Return a vocabulary. tokens: by rank, with the ids first, first + 1 ...; controls: control tokens by id."""
    found = dict(enumerate(_spell(tokens), first)) | controls
    longest = max(map(len, tokens), default=0)
    # A longer token would make many pairs. Published ones have at most some 130 bytes.
    if not longest or len(found) > MAX_TOKENS or longest > MAX_TOKEN_CHARS:
        raise FormatError(f"{path}: {len(tokens)} tokens of up to {longest} bytes are no vocabulary")
    names, types = lay_out(found, n_vocab or len(found), path)
    types = [CONTROL if id in controls else type for id, type in enumerate(types)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    # Tiktoken joins any two tokens that give a token, the lowest rank first: merges name all such pairs.
    merges = [" ".join(_spell(list(pair))) for token in tokens for pair in pairs_of(token, ranks)]
    return Vocabulary("gpt2", "", names, types, merges=merges)
