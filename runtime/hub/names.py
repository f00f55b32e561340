"""Names of models as people write them: addresses of the hub's pages, and names that are nothing."""

import os
import re
from difflib import SequenceMatcher
from pathlib import Path
from urllib.parse import unquote, urlsplit

from gguf_run.formats.errors import GgufRunError

_HOSTS = ("hf.co", "huggingface.co")
_PAGES = ("blob", "resolve", "raw", "tree")
_NEAR, _SHOWN = 0.6, 3  # the least likeness of names that are shown, and their number


def hub_name(name: str) -> str:
    """Return `hf:owner/repo...` for an address of a page or file on the hub; any other name as it is.

    GgufRunError for an address of another branch than main.
    """
    mirror = urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc
    hosts = "|".join(map(re.escape, filter(None, (*_HOSTS, mirror))))
    plain = re.sub(rf"^(hf:(//)?|(https?://)?(www\.)?({hosts})/)", "hf:", name, flags=re.I)
    if plain == name:
        return name
    parts = unquote(re.split("[?#]", plain)[0]).strip("/").split("/")
    if len(parts) > 3 and parts[2] in _PAGES:
        if parts[3] != "main":
            raise GgufRunError(f"{name}: the branch {parts[3]!r} cannot be fetched, only main")
        # The address of a folder means the repository.
        parts[2:] = parts[4:] if parts[-1].endswith(".gguf") else []
    return "/".join(parts)


def not_there(name: str) -> GgufRunError:
    """Return the error for a name of a model that is no file: it names what is here with a name like it."""
    near, hint = _nearest(name), "hf:OWNER/REPO"
    if " " in name and not near:
        return GgufRunError(f"{name}: No such file or folder; to ask the default model: gguf-run --prompt TEXT")
    if re.match("[a-z]+://", name, re.I):
        return GgufRunError(f"{name}: only addresses of the Hugging Face hub are fetched: get the file, name its path")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w-]+)?", name) and not name.endswith(".gguf"):
        hint = f"hf:{name}"
    here = f"here are: {', '.join(near)}" if near else "gguf-run --list shows what is here"
    return GgufRunError(f"{name}: No such file or folder; {here}; for a model on the Hugging Face hub write {hint}")


def _nearest(name: str) -> list[str]:
    """Return names of models on this machine that are like a name, the nearest first."""
    from gguf_run.runtime.hub.listing import cached_models

    folder = Path(name).parent
    found = [model.name or str(model.paths[0]) for model in cached_models()]
    found += [str(path) for path in folder.glob("*.gguf")] if os.path.isdir(folder) else []
    wanted = _plain(name)

    def likeness(known: str) -> float:
        key = _plain(known)
        # A name without its type is as good: "llama-1b" for "llama-1b-Q4_K_M".
        return 1.0 if wanted and wanted in key else SequenceMatcher(None, wanted, key[: len(wanted) + 2]).ratio()

    scores = sorted(((likeness(known), known) for known in dict.fromkeys(found)), key=lambda pair: -pair[0])
    return [known for score, known in scores if score >= _NEAR][:_SHOWN]


def _plain(name: str) -> str:
    """The letters and digits of a name, without folders, owner and `.gguf`."""
    return re.sub(r"[\W_]+", "", name.lower().rpartition("/")[2].removesuffix(".gguf"))
