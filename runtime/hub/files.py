"""Which of a repository's GGUF files `hf:owner/repo[:TYPE]` means, and which files are on this machine already.

Nothing here asks the hub or imports its package: what is cached is found without network and without waiting.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.hub.find import announce, models_dir

MAX_SHARDS = 1000
DEFAULT_TYPE = "Q4_K_M"
# Without a type and without Q4_K_M: about as many bits first, then more of them, then fewer.
_NEXT_BEST = (
    *("Q4_K", "Q4_K_XL", "Q4_K_L", "Q4_K_S", "MXFP4", "MXFP4_MOE", "Q4_1", "IQ4_NL", "IQ4_XS", "Q4_0", "Q4"),
    *("Q5_K_M", "Q5_K", "Q5_K_S", "Q5_K_XL", "Q5_K_L", "Q5_1", "Q5_0", "Q6_K", "Q6_K_L", "Q6_K_XL", "Q8_0", "Q8"),
    *("Q3_K_L", "Q3_K_XL", "Q3_K_M", "Q3_K", "Q3_K_S", "BF16", "F16", "FP16", "F32"),
)
_TYPE = re.compile(
    r"(?<![A-Z0-9])(?:(?:UD-)?[IT]?Q\d(?:_[A-Z0-9]{1,3})*|B?F16|FP16|FP?32|(?:NV|MX)FP4(?:_MOE)?)(?![A-Z0-9])", re.I
)
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_BESIDE = re.compile(r"mmproj|imatrix", re.I)  # what lies beside models: pictures' encoders, importance matrices


def shards(name: str) -> list[str]:
    """Return the names of all files of a split model, or the one name. GgufRunError for a number that cannot be."""
    match = _SHARD.fullmatch(name)
    if match is None:
        return [name]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count <= MAX_SHARDS:
        raise GgufRunError(f"{name}: shard {match['number']} of {match['count']}; allowed are 1 to {MAX_SHARDS} shards")
    return [f"{match['stem']}-{number:05d}-of-{match['count']}.gguf" for number in range(1, count + 1)]


def type_of(name: str) -> str:
    """Return the type that a file's name tells, such as "Q4_K_M" or "UD-Q2_K_XL"; "" if it tells none."""
    return next(reversed(_TYPE.findall(name.upper())), "")


def models_among(names: Iterable[str]) -> list[str]:
    """Return the GGUF files that are models; of split ones the first file, if all of them are there."""
    there = set(names)
    found = []
    for name in sorted(there):
        if name.lower().endswith(".gguf") and not _BESIDE.search(name):
            match = _SHARD.fullmatch(name)
            whole = match is None or (
                int(match["number"]) == 1 and 0 < int(match["count"]) <= MAX_SHARDS and there.issuperset(shards(name))
            )
            if whole:
                found.append(name)
    return found


def pick(models: Iterable[str], wanted: str | None) -> list[str]:
    """Return those of models_among that have the wanted type (any case): "Q4_K_M" before "UD-Q4_K_M".

    None: Q4_K_M, or the next best that there is. The result is empty if there is none, and has several names if the
    type does not tell them apart.
    """
    types: dict[str, list[str]] = {}
    for name in models:
        types.setdefault(type_of(name), []).append(name)
    plain = {key.removeprefix("UD-"): names for key, names in types.items() if key.startswith("UD-")} | types
    if wanted is not None:
        return plain.get(wanted.upper(), [])
    order = [key for key in (DEFAULT_TYPE, *_NEXT_BEST) if key in plain] + sorted(plain)
    return plain[order[0]] if order else []


def choose(repo: str, wanted: str | None, names: Iterable[str]) -> str:
    """Return the file of hf:repo[:wanted] among all names of the repository, and say which if it is a second choice.

    GgufRunError, which lists what there is, if there is no such type or more than one file of it.
    """
    names = list(names)
    models = models_among(names)
    found = pick(models, wanted)
    types = ", ".join(sorted({type_of(name) for name in models} - {""})) or ", ".join(models)
    if not models:
        hint = f"; its checkpoint can be run: gguf-run hf:{repo} --quantize {wanted or DEFAULT_TYPE}, or gguf-convert"
        raise GgufRunError(f"hf:{repo} has no GGUF files of models{hint if 'config.json' in names else ''}")
    if not found:
        raise GgufRunError(f"hf:{repo}:{wanted}: no file of this type in the repository; it has {types}")
    if len(found) > 1:
        raise GgufRunError(f"hf:{repo} has several such files: name one: {', '.join(f'hf:{repo}/{n}' for n in found)}")
    if wanted is None and type_of(found[0]) != DEFAULT_TYPE and len(models) > 1:
        announce(f"hf:{repo} has no {DEFAULT_TYPE}: taking {found[0]} (it has {types})")
    return found[0]


def hub_cache() -> Path:
    """The cache that huggingface_hub and other programs share."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expanduser(named or home / "hub"))  # as it is where there is no home: nothing is there


def cached_files(repo: str) -> Mapping[str, Path]:
    """Return the files of a repository that are here, by name: in the shared cache (the main branch), or in ours."""
    shared = hub_cache() / f"models--{repo.replace('/', '--')}"
    try:
        commit = (shared / "refs/main").read_text(errors="replace").strip()
    except OSError:
        commit = ""
    folders = [*([shared / "snapshots" / commit] if re.fullmatch("[0-9a-f]{4,64}", commit) else []), own_folder(repo)]
    return {
        path.relative_to(folder).as_posix(): path
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith((".part", ".lock", ".checkpoint"))
    }


def own_folder(repo: str) -> Path:
    """Where our downloads of a repository lie."""
    return models_dir() / "hub" / repo


def cached_repos() -> list[str]:
    """Return the repositories of which something is here: "owner/repo"."""
    shared = [path.name.split("--") for path in hub_cache().glob("models--*--*")]
    ours = [path.relative_to(models_dir() / "hub").parts for path in (models_dir() / "hub").glob("*/*")]
    return sorted({f"{parts[-2]}/{parts[-1]}" for parts in [*shared, *ours]})
