"""The tokenizer of a Hugging Face checkpoint as metadata of a GGUF file, under the names of llama.cpp's converter."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gguf_run.formats.errors import FormatError
from gguf_run.runtime.convert.stored.checkpoint import read_json
from gguf_run.runtime.convert.vocabulary.probe import compare_tokens
from gguf_run.runtime.convert.vocabulary.sentencepiece import is_sentencepiece, read_sentencepiece
from gguf_run.runtime.convert.vocabulary.tiktoken import read_tekken, read_tiktoken
from gguf_run.runtime.convert.vocabulary.tokenizer_json import read_tokenizer_json
from gguf_run.runtime.convert.vocabulary.vocabulary import (
    MAX_TOKENS,
    Added,
    Vocabulary,
    added_tokens,
    mark_added,
    read_file,
    text_of,
    warn,
)
from gguf_run.runtime.tokenizers.vocab import END_NAMES, NORMAL, UNUSED

_PREFIX = "tokenizer.ggml."

# Role, as tokenizer_config.json and config.json call it -> key of the GGUF file.
_ROLES: Mapping[str, str] = {
    "bos": "bos_token_id", "eos": "eos_token_id", "eot": "eot_token_id", "eom": "eom_token_id",
    "unk": "unknown_token_id", "sep": "seperator_token_id", "pad": "padding_token_id", "cls": "cls_token_id",
    "mask": "mask_token_id",
}  # fmt: skip

_SOURCES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "tiktoken.model",
    "*.tiktoken",
)  # fmt: skip


def tokenizer_metadata(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata pairs `tokenizer.*` for the checkpoint in a directory.

    config: its config.json; vocab_size, model_type and the ids of roles are used.

    FormatError for files that are missing, damaged or contradict each other. UnsupportedError for a kind of tokenizer
    that GGUF has no place for. ConversionWarning for a detail that GGUF has no place for.
    """
    n_vocab = config.get("vocab_size")
    if n_vocab is not None and (type(n_vocab) is not int or not 1 <= n_vocab <= MAX_TOKENS):
        path = directory / "config.json"
        raise FormatError(f"{path}: vocab_size is {str(n_vocab)[:40]}: a number from 1 to {MAX_TOKENS} is allowed")
    settings = _read_if_there(directory / "special_tokens_map.json")
    settings |= _read_if_there(directory / "tokenizer_config.json")
    found = [path for name in _SOURCES for path in sorted(directory.glob(name))]
    if not found:
        raise FormatError(f"{directory}: there is no tokenizer: one of {', '.join(_SOURCES)} is needed")
    path = found[0]  # the file with the most facts
    data = read_json(path) if path.name == "tokenizer.json" else None
    added = _more_added(directory, settings)
    vocabulary = _read_vocabulary(found, data, n_vocab, str(config.get("model_type", "")), added)
    if vocabulary.model not in ("llama", "t5"):  # tokenizer.json counts, where it has a token
        tokens, types = vocabulary.tokens, vocabulary.types
        added = [e for e in added if e.id < len(tokens) and types[e.id] == UNUSED and e.content not in tokens]
    mark_added(vocabulary, added)
    pairs: dict[str, Any] = {_PREFIX + name: getattr(vocabulary, name) for name in ("model", "pre", "tokens")}
    if vocabulary.scores is not None:
        pairs[f"{_PREFIX}scores"] = np.array(vocabulary.scores, np.float32)
    pairs[f"{_PREFIX}token_type"] = np.array(vocabulary.types, np.int32)
    if vocabulary.merges is not None:
        pairs[f"{_PREFIX}merges"] = vocabulary.merges
    generation = _read_if_there(directory / "generation_config.json")
    roles = _role_ids(vocabulary, settings, config)
    more = dict(vocabulary.more)
    given = generation.get("eos_token_id")
    given = config.get("eos_token_id") if given is None else given
    if ends := _add_ends(roles, vocabulary, settings, given, path):
        more["eos_token_ids"] = np.array(ends, np.int32)
    pairs |= {_PREFIX + _ROLES[role]: roles[role] for role in _ROLES if role in roles}
    for role in ("bos", "eos"):
        given = settings.get(f"add_{role}_token")
        add = more.get(f"add_{role}_token", given if isinstance(given, bool) else role in vocabulary.adds)
        more[f"add_{role}_token"] = add and role in roles
    pairs |= {_PREFIX + name: value for name, value in more.items()}
    if data is not None:
        compare_tokens(data, pairs, path)
    return pairs | dict(_chat_templates(directory, settings))


def _read_vocabulary(
    found: Sequence[Path], data: dict[str, Any] | None, n_vocab: int | None, model_type: str, added: list[Added]
) -> Vocabulary:
    """Read the vocabulary. SentencePiece's file has scores; tokenizer.json has only their order.

    found: the files, data: the object in tokenizer.json, if that is the first one.
    added: tokens that other files add to a SentencePiece model without a tokenizer.json.
    """
    first = found[0]
    piece_file = next((path for path in found if path.suffix == ".model" and is_sentencepiece(read_file(path))), None)
    if data is not None:
        vocabulary = read_tokenizer_json(data, first, n_vocab, model_type)
        if vocabulary.model == "llama" and piece_file is not None:
            exact = read_sentencepiece(piece_file, len(vocabulary.tokens))
            usual = (id for id, type in enumerate(vocabulary.types) if type == NORMAL)
            if exact.model == "llama" and all(exact.tokens[id] == vocabulary.tokens[id] for id in usual):
                # What becomes of spaces, and the tokens around a text, are those of tokenizer.json.
                exact.more, exact.adds = vocabulary.more, vocabulary.adds
                exact.roles |= vocabulary.roles
                mark_added(exact, added_tokens(data.get("added_tokens"), first))
                return exact
        return vocabulary
    if piece_file is not None:
        vocabulary = read_sentencepiece(piece_file, n_vocab, added)
        own = vocabulary.more.keys() - {"add_space_prefix"}
        if vocabulary.model == "llama" and own:
            names = ", ".join(sorted(own))
            warn(piece_file, f"its {names} is kept for gguf-run alone: in llama.cpp some texts get other tokens")
        return vocabulary
    return read_tekken(first, n_vocab) if first.name == "tekken.json" else read_tiktoken(first, n_vocab)


def _more_added(directory: Path, settings: Mapping[str, Any]) -> list[Added]:
    """Return the tokens that files beside the vocabulary's own add to it."""
    path = directory / "added_tokens.json"
    listed = [{"id": id, "content": token} for token, id in _read_if_there(path).items()]
    decoder = settings.get("added_tokens_decoder")
    entries: list[Any] = []
    for id, entry in (decoder if isinstance(decoder, Mapping) else {}).items():
        is_id = isinstance(entry, Mapping) and len(id) < 20 and id.isdecimal()  # Python reads no number of any length
        entries.append({**entry, "id": int(id)} if is_id else entry)
    return added_tokens(listed, path) + added_tokens(entries, directory / "tokenizer_config.json")


def _role_ids(vocabulary: Vocabulary, settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of roles, from the tokens around texts, tokenizer_config.json, the vocabulary or config.json."""
    ids = {token: id for id, token in enumerate(vocabulary.tokens)}
    named = {role: _content(settings.get(f"{role}_token")) for role in _ROLES}
    named["bos"] = named["bos"] or named["cls"]
    named["eos"] = named["eos"] or named["sep"]
    found: dict[str, int] = {}
    for role in _ROLES:
        around = vocabulary.roles.get(role) if vocabulary.more.get(f"add_{role}_token") else None
        for candidate in (around, named[role], vocabulary.roles.get(role), config.get(f"{role}_token_id")):
            id = ids.get(candidate) if isinstance(candidate, str) else candidate
            if isinstance(id, int) and not isinstance(id, bool) and 0 <= id < len(vocabulary.tokens):
                found[role] = id
                break
    return found


def _add_ends(
    roles: dict[str, int], vocabulary: Vocabulary, settings: Mapping[str, Any], given: Any, path: Path
) -> list[int]:
    """Add further tokens that end an answer as the roles eot and eom, and return all ends if there are more than that.

    given: eos_token_id of generation_config.json or config.json, an id or a list of them.
    ConversionWarning for an end that llama.cpp knows neither by its role nor by its text.
    """
    tokens = vocabulary.tokens
    name = _content(settings.get("eos_token")) or _content(settings.get("sep_token"))
    named = [tokens.index(name)] if name in tokens else []
    listed = [id for id in (given if isinstance(given, list) else [given]) if type(id) is int and 0 <= id < len(tokens)]
    listed.sort(key=lambda id: tokens[id] not in END_NAMES)
    ends = list(dict.fromkeys([*(roles[role] for role in ("eos", "eot", "eom") if role in roles), *named, *listed]))
    left = [id for id in ends if id not in roles.values()]
    if left and "eos" not in roles:
        roles["eos"] = left.pop(0)
    if left and "eot" not in roles:
        roles["eot"] = left.pop(0)
    unknown = [id for id in left if tokens[id] not in END_NAMES]
    if unknown and "eom" not in roles:
        roles["eom"] = unknown.pop(0)
    if unknown:
        what = f"{len(unknown)} ends of an answer, such as {tokens[unknown[0]][:40]!r},"
        warn(path, f"{what} stand under tokenizer.ggml.eos_token_ids, which llama.cpp does not read")
    return ends if unknown else []


def _chat_templates(directory: Path, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keys of chat templates. As in transformers, chat_template.jinja wins over tokenizer_config.json."""
    file = directory / "chat_template.jinja"
    given = settings.get("chat_template") or _read_if_there(directory / "chat_template.json").get("chat_template")
    templates: dict[str, str] = {"default": given} if isinstance(given, str) else {}
    for entry in given if isinstance(given, list) else ():
        name, template = text_of(entry, "name"), text_of(entry, "template")
        if name is not None and template is not None:
            templates[name] = template
    more = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    for name, path in [("default", file)] * file.is_file() + [(path.stem, path) for path in more]:
        try:
            templates[name] = read_file(path).decode()
        except UnicodeDecodeError:
            raise FormatError(f"{path}: no UTF-8") from None
    default = templates.pop("default", None)
    names = {"".join(c if c.isascii() and c.isalnum() else "_" for c in name): text for name, text in templates.items()}
    yield from ((f"tokenizer.chat_template.{name}", text) for name, text in names.items())
    if names:
        yield "tokenizer.chat_templates", list(names)
    if default is not None:
        yield "tokenizer.chat_template", default


def _content(token: Any) -> str | None:
    """Return the text of a token, which is given as a text or as an object."""
    return token if isinstance(token, str) else text_of(token, "content")


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
