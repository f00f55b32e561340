"""Models from the Hugging Face hub: `hf:owner/repo[:TYPE]`, `hf:owner/repo/file.gguf`, through huggingface_hub (the
extra `[hub]`).

huggingface_hub knows the endpoint (HF_ENDPOINT), the token (HF_TOKEN or a login), proxies and retries. Its own
download drops a partial file when the process ends (seen in 2.4.0), so the partial file is kept here: an interrupted
download goes on where it stopped, if the file on the hub is still the same.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.hub.files import DEFAULT_TYPE, cached_files, choose, models_among, own_folder, pick, shards
from gguf_run.runtime.hub.find import announce, cache_errors, models_dir

_URL = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>(?:[\w.+ -]+/)*[\w.+ -]+\.gguf)", re.ASCII)
_REPO = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+(?<!\.gguf))(?::(?P<type>[\w-]+))?", re.ASCII)
# What a checkpoint is made of: weights in the folder itself, settings, tokenizers, chat templates, the card.
_CHECKPOINT = re.compile(
    r"(model|pytorch_model)[\w.-]*\.(safetensors|bin)|[\w.-]+\.(json|model|tiktoken|jinja|txt)|README\.md", re.ASCII
)

Kind = Literal["gguf", "checkpoint", "any"]


def fetch_hub(url: str, kind: Kind = "gguf") -> Path:
    """Return the local path of hf:owner/repo/file.gguf or hf:owner/repo[:TYPE], downloaded on first use.

    Of a split model every shard is fetched. kind: what to take from a repository, a GGUF file, a checkpoint's folder,
    or a GGUF file if it has any and else the checkpoint. What is cached is used without asking the hub, or where that
    cannot be asked. Errors: GgufRunError, one line, for a wrong address, a missing extra, no access, no such
    repository, file or type, no network.
    """
    match = _URL.fullmatch(url) or _REPO.fullmatch(url)
    if match is None or ".." in url.split("/"):
        raise GgufRunError(
            f"{url!r} is not a model on the hub: write hf:owner/repo, hf:owner/repo:{DEFAULT_TYPE} or "
            "hf:owner/repo/file.gguf (subfolders are fine)"
        )
    repo, here = match["repo"], cached_files(match["repo"])
    if "file" in match.groupdict():
        return _fetch_model(url, repo, match["file"], here)
    if kind == "checkpoint" and match["type"]:
        raise GgufRunError(f"{url}: a checkpoint is wanted, which has no type: write hf:{repo}")
    known = pick(models_among(here), match["type"] or DEFAULT_TYPE) if kind != "checkpoint" else []
    if len(known) == 1:
        return here[known[0]]
    if kind != "gguf" and match["type"] is None and (own_folder(repo) / ".checkpoint").is_file():
        return own_folder(repo)
    names = _list(url, repo, match["type"], kind, here)
    if kind == "checkpoint" or (kind == "any" and not match["type"] and not models_among(names or here)):
        return _fetch_checkpoint(url, repo, names, here)
    return _fetch_model(url, repo, choose(repo, match["type"], names or here), here)


def _list(url: str, repo: str, type: str | None, kind: Kind, here: Mapping[str, Path]) -> list[str]:
    """The names of a repository's files; [] where the hub cannot be asked, if those that are here will do."""
    _check_package(url)
    from huggingface_hub import constants

    try:
        return _ask(repo)
    except Exception as error:
        reason = f"cannot list {url} on {urlsplit(constants.ENDPOINT).netloc}: {_reason(error)}"
        usable = pick(models_among(here), type) if kind != "checkpoint" else []
        if not usable and (kind == "gguf" or type or "config.json" not in here):
            raise GgufRunError(reason) from error
        announce(f"{reason}; taking what is cached")
        return []


def _ask(repo: str) -> list[str]:
    """The hub's list of the repository's files, of which none may lead out of the folder of our downloads.

    (list_repo_files would try for 24 s where there is no network.)
    """
    from huggingface_hub import model_info

    names = [file.rfilename for file in model_info(repo, timeout=15).siblings or ()]
    return [name for name in names if not re.search(r"[\\:]|(^|/)\.{0,2}(/|$)", name)]


def _check_package(url: str) -> None:
    """GgufRunError without the package; no hints of its on logins and transports between our lines."""
    try:
        from huggingface_hub import utils
    except ImportError:
        raise GgufRunError(f'{url} needs the package huggingface_hub: pip install "gguf-run[hub]"') from None
    utils.logging.set_verbosity_error()


def _fetch_model(url: str, repo: str, name: str, here: Mapping[str, Path]) -> Path:
    return [_fetch_file(url, repo, part, here) for part in shards(name)][shards(name).index(name)]


def _fetch_checkpoint(url: str, repo: str, listed: Sequence[str], here: Mapping[str, Path]) -> Path:
    names = [name for name in listed or here if _CHECKPOINT.fullmatch(name)]
    if "config.json" not in names:
        raise GgufRunError(f"{url} has neither GGUF files nor config.json: it is no model that can be run or converted")
    if any(name.endswith(".safetensors") for name in names):
        names = [name for name in names if ".bin" not in name]
    folder = own_folder(repo)
    for name in names:
        path = _fetch_file(url, repo, name, here)
        with cache_errors(models_dir()):
            folder.mkdir(parents=True, exist_ok=True)
            if path.parent != folder and not (folder / name).exists():  # another program's download
                (folder / name).symlink_to(path.resolve())
    if listed:
        (folder / ".checkpoint").touch()  # last: all is here
    return folder


def _fetch_file(url: str, repo: str, name: str, here: Mapping[str, Path]) -> Path:
    # Other programs' downloads are as good; a file that is there is used without asking the hub.
    if name in here:
        return here[name]
    _check_package(url)
    target = own_folder(repo) / name
    with cache_errors(models_dir()):
        target.parent.mkdir(parents=True, exist_ok=True)
    _download(repo, name, target)
    return target


def _download(repo: str, name: str, target: Path) -> None:
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    url = hf_hub_url(repo, name)
    file = f"hf:{repo}/{name}"
    host = urlsplit(url).netloc
    try:
        metadata = get_hf_file_metadata(url)
        size = f"{metadata.size / 1e6:.1f} MB" if metadata.size else "size unknown"
        announce(f"fetching {file} from {host} ({size}) into {models_dir()}")
        headers = build_hf_headers()
        if urlsplit(metadata.location).netloc != host:
            headers.pop("authorization", None)  # the storage host has no business with the token
        # The etag in the name: a partial file of another version is never continued.
        etag = re.sub(r"\W", "", metadata.etag or "")[:64]
        part = target.with_name(f"{target.name}.{etag}.part")
        with WeakFileLock(target.with_name(f"{target.name}.lock")):
            if target.is_file():
                return
            with part.open("ab") as output:
                http_get(
                    metadata.location,
                    output,
                    resume_size=output.tell(),
                    headers=headers,
                    expected_size=metadata.size,
                    displayed_filename=name,
                )
            _check(part, file, metadata.size, etag)
            os.replace(part, target)
    except (KeyboardInterrupt, GgufRunError):
        raise
    except Exception as error:
        # The HTTP library behind huggingface_hub, and so its errors, differs between versions.
        others = _others(repo, name) if isinstance(error, errors.EntryNotFoundError) else ""
        raise GgufRunError(f"cannot fetch {file} from {host}: {_reason(error)}{others}") from error


def _others(repo: str, name: str) -> str:
    """What may have been meant by a file that is not there."""
    try:
        models = models_among(_ask(repo))
    except Exception:  # we are reporting an error already
        return ""
    near = get_close_matches(name, models, n=1, cutoff=0.75)
    return f"; did you mean hf:{repo}/{near[0]}?" if near else f"; it has {', '.join(models) or 'no GGUF files'}"


def _check(part: Path, file: str, size: int | None, etag: str) -> None:
    """Compare a whole download with its size and, where the etag is one (large files), its sha256."""
    found = part.stat().st_size
    expected = f"{size} bytes"
    correct = size is None or found == size
    if correct and re.fullmatch("[0-9a-f]{64}", etag):
        with part.open("rb") as stream:
            correct = hashlib.file_digest(stream, "sha256").hexdigest() == etag
        expected = f"sha256 {etag}"
    if not correct:
        part.unlink()
        raise GgufRunError(f"{file}: the download ({found} bytes) is damaged, expected {expected}: try again")


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    # Order counts: the first kinds are special cases of later ones.
    reasons: list[tuple[Any, str]] = [
        (errors.GatedRepoError, "access must be asked for on the hub; then set HF_TOKEN to a token of that account"),
        (
            errors.RepositoryNotFoundError,
            "no such repository: check the spelling; if it is private, set HF_TOKEN",
        ),
        (errors.EntryNotFoundError, "no such file in the repository"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set"),
    ]
    for kind, reason in reasons:
        if isinstance(error, kind):
            return reason
    response = getattr(error, "response", None)
    if response is not None and response.status_code in (401, 403):
        return "access denied; set HF_TOKEN to a valid token"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or models_dir()}: {error.strerror}"
    if type(error).__name__ in ("ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError"):  # httpx, requests
        return f"no connection ({error}): check the network"
    return f"{str(error).strip() or type(error).__name__}; run the command again to continue"
