"""The models on this machine, and the name to type for each: for `gguf-run --list` and shell completion."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.hub.files import models_among, pick, shards, type_of
from gguf_run.runtime.hub.places import DEFAULT_MODEL, cached_files, cached_repos, hub_cache, models_dir
from gguf_run.runtime.terminal.table import table
from gguf_run.runtime.terminal.text import one_line, size_text


@dataclass(frozen=True)
class CachedModel:
    """A model on this machine."""

    name: str  # what to type; "" for the default model
    type: str  # in the name of a GGUF file, such as "Q4_K_M"; "checkpoint" for a checkpoint
    paths: tuple[Path, ...]  # the files with the weights

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for path in self.paths)

    def kind(self) -> str:
        """Return architecture and size, as "llama 135M"; "damaged" if the file cannot be read."""
        from gguf_run.formats.gguf.reader import GGUFFile
        from gguf_run.runtime.quantize.file_types import model_type

        try:
            if self.type == "checkpoint":
                config = json.loads((self.paths[0].parent / "config.json").read_text())
                return one_line(str(config["model_type"]))
            with GGUFFile.open(self.paths[0]) as file:
                return " ".join(one_line(model_type(file)).split()[:2])
        except (GgufRunError, OSError, ValueError, LookupError, TypeError, RecursionError):
            return "damaged"


def cached_models() -> list[CachedModel]:
    """Return the models on this machine: the default model, then models of the hub."""
    default = models_dir() / Path(DEFAULT_MODEL.member).name
    found = [CachedModel("", type_of(default.name), (default,))] if default.is_file() else []
    for repo in cached_repos():
        here = cached_files(repo)
        models = models_among(here, repo)
        for name in models:
            type = type_of(name)
            only = bool(type) and pick(models_among(here), type) == [name]
            paths = tuple(here[part] for part in shards(name))
            found.append(CachedModel(f"hf:{repo}:{type}" if only else f"hf:{repo}/{name}", type, paths))
        weights = tuple(path for name, path in here.items() if name.endswith(".safetensors") and "/" not in name)
        if not models and weights and "config.json" in here:
            found.append(CachedModel(f"hf:{repo}", "checkpoint", weights))
    return found


def list_lines(verbose: bool) -> Iterator[str]:
    """Yield a table as lines. verbose: with a column of paths."""
    rows = []
    for model in cached_models():
        name, path = one_line(model.name) or "(the default)", one_line(str(model.paths[0]))
        rows.append([name, model.type, size_text(model.nbytes), model.kind(), path])
    head, align = ["model", "type", "size", "architecture", "path"], "llrll"
    n = 5 if verbose else 4
    yield from table(head[:n], [row[:n] for row in rows], align[:n])
    if not rows:
        yield f"none yet; they will be in {models_dir()} and {hub_cache()}"
