"""general.* metadata: what the card (README.md) states, the name, the size, and the names of files."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from gguf_run.formats.errors import FormatError
from gguf_run.formats.gguf.metadata import Typed
from gguf_run.formats.gguf.tensors import TensorInfo
from gguf_run.formats.gguf.writer_metadata import MetaValue
from gguf_run.runtime.convert.stored.checkpoint import read_json

_MAX_CARD_BYTES = 1 << 18  # YAML takes seconds for so much
_MAX_DEPTH = 32  # of lists in lists: the time that YAML takes grows with its square
_LARGEST_NUMBER = 1 << 53
_HUB = "https://huggingface.co/"
# Key under general. -> fields of the card. The first one that is there counts.
_TEXTS = {
    "name": ("name", "model_name"),
    "author": ("author", "model_author", "model_creator"),
    "license": ("license",),
    "license.name": ("license_name",),
    "license.link": ("license_link",),
}
# Key under general. -> fields of the card. All of them count.
_LISTS = {"tags": ("tags", "pipeline_tag"), "languages": ("languages", "language")}
# generation_config.json -> key under general.sampling, and its type.
_SAMPLING = (
    ("top_k", "top_k", "i32"), ("top_p", "top_p", "f32"), ("min_p", "min_p", "f32"), ("temperature", "temp", "f32"),
    ("repetition_penalty", "penalty_repeat", "f32"),
)  # fmt: skip
# Keys of generation_config.json that change an answer and have no key here -> the value with which they do not.
_NOT_CARRIED: Mapping[str, Any] = {
    "no_repeat_ngram_size": 0, "suppress_tokens": None, "begin_suppress_tokens": None, "bad_words_ids": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "sequence_bias": None, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "num_beams": 1, "guidance_scale": 1.0, "penalty_alpha": 0.0,
    "min_length": 0, "min_new_tokens": 0, "exponential_decay_length_penalty": None,
}  # fmt: skip


def general_metadata(directory: Path, name: str | None, tensors: Sequence[TensorInfo]) -> dict[str, MetaValue]:
    """Return the general.* keys that describe the model.

    name: what the user calls it; None: the card's name, else that of the folder.
    """
    card = _read_card(directory)
    found: dict[str, MetaValue] = dict(_sampling(directory))
    for key, names in _TEXTS.items():
        if texts := _texts(next((card[n] for n in names if card.get(n) is not None), None)):
            found[key] = ",".join(texts)
    found["name"] = name or found.get("name") or _folder_name(directory)
    if tensors:
        found["size_label"] = size_label(tensors)
    found.update(_base_models(_texts(card.get("base_model"))))
    for key, names in _LISTS.items():
        if texts := [text for n in names for text in _texts(card.get(n))]:
            found[key] = Typed("array[string]", texts)
    return {f"general.{key}": value for key, value in found.items()}


def _read_card(directory: Path) -> dict[str, Any]:
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

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            if self.depth > _MAX_DEPTH:
                raise yaml.YAMLError
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    try:
        card = yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}  # a card is for people; the model does not depend on it
    return card if isinstance(card, dict) else {}


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    # A number of 9,000 digits is no text: Python refuses to write it.
    return [str(v) for v in values if isinstance(v, str) or (type(v) in (int, float) and abs(v) < _LARGEST_NUMBER)]


def _folder_name(directory: Path) -> str:
    """Return the folder's name. The hub's cache calls it models--owner--name/snapshots/revision."""
    path = directory.resolve()
    kind, _, repo = path.parent.parent.name.partition("--")
    return repo.partition("--")[2] if kind == "models" and path.parent.name == "snapshots" else path.name


def _sampling(directory: Path) -> Iterator[tuple[str, MetaValue]]:
    path = directory / "generation_config.json"
    try:
        given = read_json(path) if path.is_file() else {}
    except FormatError:
        return
    told = [name for name, off in _NOT_CARRIED.items() if given.get(name, off) not in (off, None, [], 0)]
    if told:
        what = f"{', '.join(told)}: a GGUF file has no place for that, the model answers without it"
        warnings.warn(f"{path}: {what}", stacklevel=2)
    for name, key, kind in _SAMPLING:
        value = given.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**31:
            yield f"sampling.{key}", Typed(kind, int(value) if kind == "i32" else float(value))


def _base_models(ids: Sequence[str]) -> Iterator[tuple[str, MetaValue]]:
    """Yield the keys of the models that this one was made from. ids: "owner/name", or the address of a repository."""
    if ids:
        yield "base_model.count", Typed("u32", len(ids))
    for i, text in enumerate(ids):
        owner, _, name = text.removeprefix(_HUB).rpartition("/")
        if "://" in owner:
            yield f"base_model.{i}.repo_url", text
            continue
        yield f"base_model.{i}.name", name
        if owner:
            yield f"base_model.{i}.organization", owner
            yield f"base_model.{i}.repo_url", f"{_HUB}{owner}/{name}"


def size_label(tensors: Sequence[TensorInfo]) -> str:
    """Return the size as "135M"; of a model with experts as "8x7B": their number, and parameters with one of them."""
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


def file_name(metadata: Mapping[str, Any], type_name: str) -> str:
    """Return "name-type.gguf", without characters that mean something to a shell or a file system."""
    text = f"{metadata.get('general.name') or 'model'}-{type_name}"
    return re.sub(r"[\s/\\:*?\"<>|\x00-\x1f]+", "-", text).lstrip(".") + ".gguf"
