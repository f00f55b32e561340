"""Models of the Hugging Face hub by name, downloaded by huggingface_hub (the extra `[hub]`) into its cache.

The package knows the endpoint (HF_ENDPOINT), the token (HF_TOKEN or a login), proxies and retries. Here are the names,
the choice of files, and errors of one line.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.hub.files import DEFAULT_TYPE, choose, models_among, pick, shards
from gguf_run.runtime.hub.places import cached_files, hub_cache, own_folder, shared_files
from gguf_run.runtime.terminal.text import message, size_text

_URL = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>(?:[\w.+ -]+/)*[\w.+ -]+\.gguf)", re.ASCII)
_REPO = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+(?<!\.gguf))(?::(?P<type>[\w-]+))?", re.ASCII)
# The files of a checkpoint: weights, settings, tokenizers, chat templates and the card, all in the first folder.
_CHECKPOINT = re.compile(
    r"(model|pytorch_model)[\w.-]*\.(safetensors|bin)|[\w.-]+\.(json|model|tiktoken|jinja|txt)|README\.md", re.ASCII
)

Kind = Literal["gguf", "checkpoint", "any"]


def fetch_hub(url: str, kind: Kind = "gguf") -> Path:
    """Return the local path of hf:owner/repo/file.gguf or hf:owner/repo[:TYPE]; download what is not here yet.

    kind: "gguf": a GGUF file (of a split model the first one, all are fetched); "checkpoint": the folder of a
    checkpoint; "any": a GGUF file if the repository has one, else the checkpoint.
    What is cached is used without asking the hub, and also where the hub cannot be asked.
    GgufRunError, one line: a wrong address, no package, no access, no such repository, file or type, no network.
    """
    match = _URL.fullmatch(url) or _REPO.fullmatch(url)
    if match is None or ".." in url.split("/"):
        raise GgufRunError(
            f"{url!r} is not a model on the hub: write hf:owner/repo, hf:owner/repo:{DEFAULT_TYPE} or "
            "hf:owner/repo/file.gguf (subfolders are fine)"
        )
    repo, here = match["repo"], cached_files(match["repo"])
    if "file" in match.groupdict():
        return _fetch_model(repo, match["file"], here)
    if kind == "checkpoint" and match["type"]:
        raise GgufRunError(f"{url}: a checkpoint is wanted, which has no type: write hf:{repo}")
    known = pick(models_among(here), match["type"] or DEFAULT_TYPE) if kind != "checkpoint" else []
    if len(known) == 1:
        return here[known[0]]
    if kind != "gguf" and match["type"] is None and (folder := _known_checkpoint(repo)):
        return folder
    names = _list(url, repo, match["type"], kind, here)
    if kind == "checkpoint" or (kind == "any" and not match["type"] and not models_among(names or here)):
        return _fetch_checkpoint(repo, names, here)
    return _fetch_model(repo, choose(repo, match["type"], names or here), here)


def _list(url: str, repo: str, type: str | None, kind: Kind, here: Mapping[str, Path]) -> list[str]:
    """Return the names of a repository's files; [] if the hub cannot be asked and the cached files are enough."""
    _check_package(url)
    from huggingface_hub import constants

    try:
        return _ask(repo)
    except Exception as error:
        reason = f"cannot list {url} on {urlsplit(constants.ENDPOINT).netloc}: {_reason(error)}"
        usable = pick(models_among(here), type) if kind != "checkpoint" else []
        if not usable and (kind == "gguf" or type or "config.json" not in here):
            raise GgufRunError(reason) from error
        message(f"{reason}; taking what is cached")
        return []


def _ask(repo: str) -> list[str]:
    """Return the names of a repository's files as the hub tells them, without names that lead out of their folder."""
    from huggingface_hub import model_info  # list_repo_files would try for 24 s where there is no network

    names = [file.rfilename for file in model_info(repo, timeout=15).siblings or ()]
    return [name for name in names if not re.search(r"[\\:]|(^|/)\.{0,2}(/|$)", name)]


def _check_package(url: str) -> None:
    """GgufRunError if huggingface_hub is missing. Turn off its hints about logins and transports."""
    try:
        from huggingface_hub import utils
    except ImportError:
        raise GgufRunError(f'{url} needs the package huggingface_hub: pip install "gguf-run[hub]"') from None
    utils.logging.set_verbosity_error()


def _fetch_model(repo: str, name: str, here: Mapping[str, Path]) -> Path:
    parts = shards(name)
    return _fetch(repo, parts, here)[parts.index(name)]


def _known_checkpoint(repo: str) -> Path | None:
    """Return the folder of a checkpoint that was once fetched completely: it is named in a mark of ours."""
    mark = own_folder(repo) / ".checkpoint"
    if not mark.is_file():
        return None
    folder = Path(mark.read_text() or own_folder(repo))  # empty: of an earlier version, which kept it there
    return folder if (folder / "config.json").is_file() else None


def _fetch_checkpoint(repo: str, listed: Sequence[str], here: Mapping[str, Path]) -> Path:
    names = [name for name in listed or here if _CHECKPOINT.fullmatch(name)]
    if "config.json" not in names:
        raise GgufRunError(
            f"hf:{repo} has neither GGUF files nor config.json: it is no model that can be run or converted"
        )
    if any(name.endswith(".safetensors") for name in names):
        names = [name for name in names if ".bin" not in name]
    folder = _fetch(repo, names, here)[0].parent
    if listed:
        with suppress(OSError):  # without the mark, the hub is asked again
            own_folder(repo).mkdir(parents=True, exist_ok=True)
            (own_folder(repo) / ".checkpoint").write_text(str(folder))
    return folder


def _fetch(repo: str, names: Sequence[str], here: Mapping[str, Path]) -> list[Path]:
    """Return the paths of files that lie in one folder; what is not in such a folder yet comes from the hub."""
    paths = [here[name] for name in names if name in here]
    if len(paths) < len(names) or len({path.parent for path in paths}) > 1:
        shared = shared_files(repo)
        paths = [shared.get(name) or _download(repo, name) for name in names]
        if len({path.parent for path in paths}) > 1:
            raise GgufRunError(f"hf:{repo} was changed on the hub while it was fetched: run the command again")
    return paths


def _download(repo: str, name: str) -> Path:
    _check_package(f"hf:{repo}")
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url

    url, file = hf_hub_url(repo, name), f"hf:{repo}/{name}"
    host = urlsplit(url).netloc
    try:
        metadata = get_hf_file_metadata(url)
        size = size_text(metadata.size, 1) if metadata.size else "size unknown"
        message(f"fetching {file} from {host} ({size}) into {hub_cache()}")
        return Path(hf_hub_download(repo, name))
    except Exception as error:
        # The HTTP library behind huggingface_hub, and so its errors, differs between versions.
        others = _others(repo, name) if isinstance(error, errors.EntryNotFoundError) else ""
        raise GgufRunError(f"cannot fetch {file} from {host}: {_reason(error)}{others}") from error


def _others(repo: str, name: str) -> str:
    """Return what the user may have meant by a file that is not there."""
    try:
        models = models_among(_ask(repo))
    except Exception:  # we are reporting an error already
        return ""
    near = get_close_matches(name, models, n=1, cutoff=0.75)
    return f"; did you mean hf:{repo}/{near[0]}?" if near else f"; it has {', '.join(models) or 'no GGUF files'}"


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    # Order counts: the first kinds are special cases of later ones.
    reasons: list[tuple[Any, str]] = [
        (errors.GatedRepoError, "access must be asked for on the hub; then set HF_TOKEN to a token of that account"),
        (errors.RepositoryNotFoundError, "no such repository: check the spelling; if it is private, set HF_TOKEN"),
        (errors.EntryNotFoundError, "no such file in the repository"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set"),
    ]
    for kind, reason in reasons:
        if isinstance(error, kind):
            return reason
    if getattr(getattr(error, "response", None), "status_code", 0) in (401, 403):
        return "access denied; set HF_TOKEN to a valid token"
    if type(error).__name__ in ("ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError"):  # httpx, requests
        return f"no connection ({error}): check the network"
    return f"{str(error).strip() or type(error).__name__}; run the command again"
