"""Models from the Hugging Face hub: `hf:owner/repo/file.gguf`, through huggingface_hub (the extra `[hub]`).

huggingface_hub knows the endpoint (HF_ENDPOINT), the token (HF_TOKEN or a login), proxies and retries. Its own
download drops a partial file when the process ends (seen in 2.4.0), so the partial file is kept here: an interrupted
download goes on where it stopped, if the file on the hub is still the same.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.fetch import announce, cache_errors, models_dir

_URL = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>(?:[\w.+ -]+/)*[\w.+ -]+\.gguf)", re.ASCII)
_REPO = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)", re.ASCII)
# What a checkpoint is made of: weights in the folder itself, settings, tokenizers, chat templates, the card.
_CHECKPOINT = re.compile(
    r"(model|pytorch_model)[\w.-]*\.(safetensors|bin)|[\w.-]+\.(json|model|tiktoken|jinja|txt)|README\.md", re.ASCII
)
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MAX_SHARDS = 1000


def fetch_hub(url: str) -> Path:
    """Return the local path of a file on the hub, downloaded on first use; of a split model, fetch every shard.

    Errors: GgufRunError, one line, for a wrong address, a missing extra, no access, no such file, no network.
    """
    match = _URL.fullmatch(url)
    if match is None or ".." in url.split("/"):
        raise GgufRunError(f"{url!r} is not a model on the hub: write hf:owner/repo/file.gguf (subfolders are fine)")
    _check_package(url)
    names = _shards(match["file"])
    paths = [_fetch_file(match["repo"], name) for name in names]
    return paths[names.index(match["file"])]


def _check_package(url: str) -> None:
    """GgufRunError without the package; no hints of its on logins and transports between our lines."""
    try:
        from huggingface_hub import utils
    except ImportError:
        raise GgufRunError(f'{url} needs the package huggingface_hub: pip install "gguf-run[hub]"') from None
    utils.logging.set_verbosity_error()


def fetch_checkpoint(url: str) -> Path:
    """Return the folder with a repository's config.json, tokenizer and weights, downloaded on first use.

    Errors: as fetch_hub.
    """
    match = _REPO.fullmatch(url)
    if match is None or ".." in url:
        raise GgufRunError(f"{url!r} is not a repository on the hub: write hf:owner/repo, or hf:owner/repo/file.gguf")
    folder = models_dir() / "hub" / match["repo"]
    complete = folder / ".checkpoint"  # written last
    if complete.is_file():
        return folder
    _check_package(url)
    from huggingface_hub import list_repo_files

    try:
        names = [name for name in list_repo_files(match["repo"]) if _CHECKPOINT.fullmatch(name)]
    except Exception as error:
        raise GgufRunError(f"cannot list {url}: {_reason(error)}") from error
    if "config.json" not in names:
        raise GgufRunError(f"{url} has no config.json: it is not a checkpoint; of GGUF files name one")
    if any(name.endswith(".safetensors") for name in names):
        names = [name for name in names if ".bin" not in name]
    for name in names:
        path = _fetch_file(match["repo"], name)
        with cache_errors(models_dir()):
            folder.mkdir(parents=True, exist_ok=True)
            if path.parent != folder and not (folder / name).exists():  # another program's download
                (folder / name).symlink_to(path.resolve())
    complete.touch()
    return folder


def _shards(name: str) -> list[str]:
    match = _SHARD.fullmatch(name)
    if match is None:
        return [name]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count <= MAX_SHARDS:
        raise GgufRunError(f"{name}: shard {match['number']} of {match['count']}; allowed are 1 to {MAX_SHARDS} shards")
    return [f"{match['stem']}-{number:05d}-of-{match['count']}.gguf" for number in range(1, count + 1)]


def _fetch_file(repo: str, name: str) -> Path:
    from huggingface_hub import try_to_load_from_cache

    # Other programs' downloads are as good; a file that is there is used without asking the hub.
    known = try_to_load_from_cache(repo, name)
    if isinstance(known, str):
        return Path(known)
    target = models_dir() / "hub" / repo / name
    if not target.is_file():
        with cache_errors(models_dir()):
            target.parent.mkdir(parents=True, exist_ok=True)
        _download(repo, name, target)
    return target


def _download(repo: str, name: str, target: Path) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
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
        raise GgufRunError(f"cannot fetch {file} from {host}: {_reason(error)}") from error


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
        (errors.RepositoryNotFoundError, "no such repository, or it is private: then set HF_TOKEN to your token"),
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
    return f"{str(error).strip() or type(error).__name__}; run the command again to continue"
