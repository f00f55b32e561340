"""general.* metadata: what a model is called and who made it, from its card (README.md), config.json and folder.

Names follow the GGUF naming convention: basename-size-finetune-version-type.gguf. The parts of "owner/Name-1.5-7B-Chat"
are told apart by how they look, as llama.cpp's converter does it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from gguf_run.formats.errors import FormatError
from gguf_run.formats.gguf.metadata import Typed
from gguf_run.formats.gguf.tensors import TensorInfo
from gguf_run.formats.gguf.writer_metadata import MetaValue
from gguf_run.runtime.convert.stored.checkpoint import read_json

_MAX_CARD_BYTES = 1 << 20
_HUB = "https://huggingface.co/"
# key under general. -> names in the card, the first that is there counts
_CARD = {
    "name": ("name", "model_name"),
    "author": ("author", "model_author", "model_creator"),
    "version": ("version", "model_version"),
    "organization": ("organization", "model_organization"),
    "finetune": ("finetune", "model_finetune"),
    "basename": ("basename", "model_basename", "model_type"),
    "description": ("description", "model_description"),
    "size_label": ("size_label", "model_size_label"),
    "license": ("license",),
    "license.name": ("license_name",),
    "license.link": ("license_link",),
    "source.url": ("url", "model_url"),
    "source.doi": ("doi", "model_doi"),
    "source.uuid": ("uuid", "model_uuid"),
    "source.repo_url": ("repo_url", "model_repo_url"),
}
_LISTS = {"tags": ("tags", "pipeline_tag"), "languages": ("languages", "language")}
_RELATIVES = {"base_model": ("base_model", "base_models", "base_model_sources"), "dataset": ("datasets", "dataset")}
_NAMED = ("name", "organization", "basename", "finetune", "version", "size_label")
# generation_config.json -> general.sampling.
_SAMPLING = (
    ("top_k", "top_k", "i32"), ("top_p", "top_p", "f32"), ("min_p", "min_p", "f32"), ("temperature", "temp", "f32"),
    ("repetition_penalty", "penalty_repeat", "f32"),
)  # fmt: skip


@dataclass(frozen=True)
class NameParts:
    """What the name of a model tells; None: it does not."""

    name: str | None = None
    organization: str | None = None
    basename: str | None = None
    finetune: str | None = None
    version: str | None = None
    size_label: str | None = None


def general_metadata(
    directory: Path, config: Mapping[str, Any], name: str | None, tensors: Sequence[TensorInfo]
) -> dict[str, MetaValue]:
    """Return the general.* keys that describe the model. name: what the user calls it."""
    card = read_card(directory)
    n_params = sum(tensor.n_elements for tensor in tensors)
    found: dict[str, MetaValue] = {}
    for key, names in _CARD.items():
        if texts := _texts(next((card[n] for n in names if card.get(n) is not None), None)):
            found[key] = ",".join(texts)
    path = config.get("_name_or_path")
    sources = [path] if isinstance(path, str) and path.count("/") <= 1 else []
    for text in [*sources, directory.resolve().name]:
        parts = name_parts(text, n_params)
        for key in _NAMED:
            value = getattr(parts, key)
            if value and key not in found:
                found[key] = titled(value) if key == "name" else value
    found["name"] = name or found.get("name") or directory.resolve().name
    if tensors and "size_label" not in found:
        found["size_label"] = size_label(tensors)
    for kind, names in _RELATIVES.items():
        found.update(_relatives(kind, next((card[n] for n in names if card.get(n) is not None), None), n_params))
    for key, names in _LISTS.items():
        if texts := [text for n in names for text in _texts(card.get(n))]:
            found[key] = Typed("array[string]", texts)
    order = ["name", "author", "version", "organization", "finetune", "basename", "description", "size_label"]
    keys = [*(key for key in order if key in found), *(key for key in found if key not in order)]
    return {f"general.{key}": value for key, value in [*_sampling(directory), *((key, found[key]) for key in keys)]}


def read_card(directory: Path) -> dict[str, Any]:
    """Return the fields that stand before the text of README.md, as YAML between lines of three dashes."""
    import yaml

    path = directory / "README.md"
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = file.read(_MAX_CARD_BYTES).splitlines()
    if not lines or lines[0] != "---":
        return {}
    text = "\n".join(takewhile(lambda line: line != "---", lines[1:])).replace("\t", "  ")
    # YAML takes a bare "no", the code of Norwegian, for false.
    text = re.sub(r"^(\s*(?:- |language: ))no\s*$", r'\1"no"', text, flags=re.MULTILINE)
    try:
        card = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}  # a card is for people; the model does not depend on it
    return card if isinstance(card, dict) else {}


def _sampling(directory: Path) -> Iterator[tuple[str, MetaValue]]:
    path = directory / "generation_config.json"
    try:
        given = read_json(path) if path.is_file() else {}
    except FormatError:
        return
    for name, key, type in _SAMPLING:
        value = given.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**31:
            yield f"sampling.{key}", Typed(type, int(value) if type == "i32" else float(value))


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [str(item) for item in values if isinstance(item, str | int | float) and not isinstance(item, bool)]


def _relatives(kind: str, value: Any, n_params: int) -> dict[str, MetaValue]:
    """Keys of the models, or data sets, that a card says this one comes from."""
    if not (ids := _texts(value)):
        return {}
    found: dict[str, MetaValue] = {f"{kind}.count": Typed("u32", len(ids))}
    for i, id in enumerate(ids):
        url = id if re.match(r"\w+://", id) else None
        parts = name_parts(id.removeprefix(_HUB), n_params) if url is None or id.startswith(_HUB) else NameParts()
        repo = url or (f"{_HUB}{id}" if parts.organization else None)
        fields = {
            "name": titled(parts.name) if parts.name else None,
            "version": parts.version,
            "organization": titled(parts.organization) if parts.organization else None,
            "repo_url": repo,
        }
        found.update({f"{kind}.{i}.{key}": text for key, text in fields.items() if text})
    return found


def titled(text: str) -> str:
    """Words with a capital, unless they hold one already or are versions and sizes."""
    words = text.strip().replace("-", " ").split()
    return " ".join(
        word.title() if word.islower() and not re.fullmatch(r"v\d+(\.\d+)*|\d.*", word) else word for word in words
    )


def name_parts(id: str, n_params: int = 0) -> NameParts:
    """Tell the parts of "owner/name" or "name" apart. n_params: the model's size, to know a size from a length of
    contexts ("128k"); 0: unknown."""
    if " " in id:
        return NameParts(id)
    owner, slash, name = id.rpartition("/") if "/" in id else ("", "", id)
    parts = [_kind(part, i, n_params) for i, part in enumerate(word for word in name.split("-") if word)]
    if any(kind == "size_label" and re.search(r"\d", part) for part, kind in parts):  # "small" is no size beside "7B"
        parts = [(part, "" if kind == "size_label" and part.isalpha() else kind) for part, kind in parts]
    # The name itself comes first: words without a kind, and versions between them.
    n_base = len(list(takewhile(lambda p: p[1] == "version" or (not p[1] and p[0][0].isalpha()), parts)))
    while n_base == len(parts) and n_base and parts[-1][1] == "version":  # "name-1.5" is version 1.5 of "name"
        n_base -= len(list(takewhile(lambda p: p[1] == "version", reversed(parts))))

    def joined(kind: str) -> str | None:
        words = [part for part, k in parts[n_base:] if k == kind or (kind == "finetune" and not k)]
        return "-".join(dict.fromkeys(words) if kind == "size_label" else words) or None

    found = {kind: joined(kind) for kind in ("finetune", "version", "size_label")}
    basename = "-".join(part for part, _ in parts[:n_base]) if any(found.values()) else ""
    organization = owner if slash and not owner.startswith(".") else ""
    return NameParts(name or None, organization or None, basename or None, **found)


def _kind(part: str, i: int, n_params: int) -> tuple[str, str]:
    """A part of a name as it is written, and what it looks like."""
    if re.fullmatch(r"(v|iter)?\d+(\.\d+)*", part, re.IGNORECASE):
        return part, "version"
    if re.fullmatch(r"i?q\d(_\w)*|b?fp?(16|32)", part, re.IGNORECASE):
        return part.upper(), "type"
    if i and re.fullmatch(r"(([A]|\d+[x])?\d+([._]\d+)?[KMBT]\d?|small|mini|medium|large|x?xl)", part, re.IGNORECASE):
        part = part.replace("_", ".")
        if part[-1].isdecimal():  # 7b1 is 7.1B
            part = f"{part[:-2]}.{part[-1]}{part[-2]}"
        if len(part) > 1 and part[-2].isdecimal():
            part = part[:-1] + part[-1].upper()
        number = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT])", part)
        if number and n_params:
            stated = float(number[1]) * 1000.0 ** (" KMBT".index(number[2]))
            if abs(stated - n_params) > 7 * n_params // 8:  # not its size: a length of contexts, or of training
                return part[:-1] + part[-1].lower(), "finetune"
        return part, "size_label"
    return part, "finetune" if i and re.fullmatch("chat|instruct|vision|lora", part, re.IGNORECASE) else ""


def size_label(tensors: Sequence[TensorInfo]) -> str:
    """Return the size as "135M", of experts as "8x7B": number of experts, and parameters with one of them."""
    experts = [tensor for tensor in tensors if "_exps." in tensor.name]
    n = sum(tensor.n_elements for tensor in tensors)
    if not experts:
        return _rounded(n)
    one = sum(tensor.n_elements // tensor.ne[-1] for tensor in experts)
    count = sum(tensor.ne[-1] for tensor in experts) // len(experts)
    return f"{count}x{_rounded(n - sum(tensor.n_elements for tensor in experts) + one)}"


def _rounded(n: int) -> str:
    power = next((p for p in (4, 3, 2) if n > 1000**p), 1)
    scaled = n / 1000**power
    return f"{scaled:.{max(2 - len(str(round(scaled)).lstrip('0')), 0)}f}{' KMBT'[power]}"


def file_name(metadata: Mapping[str, Any], type_name: str | None) -> str:
    """Return the name that a file has by convention. type_name: None for a file of a vocabulary alone."""
    base = metadata.get("general.basename") or metadata.get("general.name") or "model"
    size = metadata.get("general.size_label") if type_name else None
    parts = [base, size, metadata.get("general.finetune"), metadata.get("general.version"), type_name or "vocab"]
    text = "-".join(str(part).strip() for part in parts if part)
    return re.sub(r"[\s/\\:*?\"<>|\x00-\x1f]+", "-", text).lstrip(".") + ".gguf"
