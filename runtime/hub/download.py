"""Models of the Hugging Face hub by name, downloaded by huggingface_hub (the extra `[hub]`) into its cache.

The package knows the endpoint (HF_ENDPOINT), the token (HF_TOKEN or a login), proxies and retries. Here are the names,
the choice of files, and errors of one line.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.hub.files import DEFAULT_TYPE, Kind, choose, models_among, pick, shards
from gguf_run.runtime.hub.places import cached_files, hub_cache, own_folder, shared_files
from gguf_run.runtime.terminal.text import message, size_text

_NAME = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)"
    r"(/(?P<file>([\w.+ -]+/)*[\w.+ -]+\.gguf)|(?<!\.gguf)(:(?P<type>[\w-]+))?)",
    re.ASCII,
)
# The files of a checkpoint: weights, settings, tokenizers, chat templates and the card, all in the first folder.
_CHECKPOINT = re.compile(
    r"(model|pytorch_model)[\w.-]*\.(safetensors|bin)|[\w.-]+\.(json|model|tiktoken|jinja|txt)|README\.md", re.ASCII
)

_COMMIT, _TAG, _SHA256 = map(re.compile, ("[0-9a-f]{4,64}", r"[0-9A-Za-z_][\w.-]{0,127}", "[0-9a-f]{64}"))
MAX_UNKNOWN_BYTES = 256 << 20  # of a file whose size the hub does not announce


def fetch_hub(url: str, kind: Kind = "gguf") -> Path:
    """Return the local path of hf:owner/repo/file.gguf or hf:owner/repo[:TYPE]; download what is not here yet.

    A split model is fetched whole; the path is that of its first file. The path of a checkpoint is its folder.
    What is cached is used without asking the hub, and also where the hub cannot be asked.
    GgufRunError, one line: a wrong address, no package, no access, no such repository, file or type, no network.
    """
    match = _NAME.fullmatch(url)
    if match is None or ".." in url.split("/"):
        raise GgufRunError(
            f"{url!r} is not a model on the hub: write hf:owner/repo, hf:owner/repo:{DEFAULT_TYPE} or "
            "hf:owner/repo/file.gguf (subfolders are fine)"
        )
    repo, file, type = match["repo"], match["file"], match["type"]
    here = cached_files(repo)
    if file:
        return _fetch_model(repo, file, here)
    if kind == "checkpoint" and type:
        raise GgufRunError(f"{url}: a checkpoint is wanted, which has no type: write hf:{repo}")
    return _cached(repo, type, kind, here) or _choose_and_fetch(repo, type, kind, here)


def _cached(repo: str, type: str | None, kind: Kind, here: Mapping[str, Path]) -> Path | None:
    """Return what can be used without asking the hub: the one model of the wanted type, or a whole checkpoint."""
    known = pick(models_among(here), type or DEFAULT_TYPE) if kind != "checkpoint" else []
    if len(known) == 1:
        return here[known[0]]
    mark = _mark(repo)
    if kind == "gguf" or type or not mark.is_file():
        return None
    folder = Path(mark.read_text() or mark.parent)  # empty: an earlier version of this program kept the files there
    return folder if (folder / "config.json").is_file() else None


def _choose_and_fetch(repo: str, type: str | None, kind: Kind, here: Mapping[str, Path]) -> Path:
    """Let the hub list a repository and fetch the right files. Where the hub cannot be asked, take cached files."""
    url = f"hf:{repo}:{type}" if type else f"hf:{repo}"
    hub = _package(url)
    try:
        names, is_listed = _ask(repo), True
    except Exception as error:
        host = urlsplit(hub.constants.ENDPOINT).netloc
        reason = f"cannot list {url} on {host}: {_reason(error)}"
        usable = pick(models_among(here, repo), type) if kind != "checkpoint" else []
        if not usable and (kind == "gguf" or type or "config.json" not in here):
            raise GgufRunError(reason) from error
        message(f"{reason}; taking what is cached")
        names, is_listed = list(here), False
    if kind == "gguf" or type or (kind == "any" and models_among(names, repo)):
        return _fetch_model(repo, choose(repo, type, names), here)
    folder = _fetch_checkpoint(repo, names, here)
    if is_listed:
        with suppress(OSError):  # without the mark, the hub is asked again
            _mark(repo).parent.mkdir(parents=True, exist_ok=True)
            _mark(repo).write_text(str(folder))
    return folder


def _mark(repo: str) -> Path:
    """Return the file that names the folder of a checkpoint once that was fetched whole."""
    return own_folder(repo) / ".checkpoint"


def _ask(repo: str) -> list[str]:
    """Return the names of a repository's files as the hub tells them.

    Names are left out that lead out of their folder, or that hold what a terminal would obey, such as escape codes.
    """
    from huggingface_hub import model_info  # list_repo_files would try for 24 s where there is no network

    names = [file.rfilename for file in model_info(repo, timeout=15).siblings or ()]
    return [name for name in names if name.isprintable() and not re.search(r"[\\:]|(^|/)\.{0,2}(/|$)", name)]


def _package(url: str) -> Any:
    """Return huggingface_hub, without its hints about logins and transports. GgufRunError if it is missing."""
    try:
        import huggingface_hub.utils  # so that the attributes constants and errors are there, too
    except ImportError:
        raise GgufRunError(f'{url} needs the package huggingface_hub: pip install "gguf-run[hub]"') from None
    huggingface_hub.utils.logging.set_verbosity_error()
    return huggingface_hub


def _fetch_model(repo: str, name: str, here: Mapping[str, Path]) -> Path:
    parts = shards(name)
    return _fetch(repo, parts, here)[parts.index(name)]


def _fetch_checkpoint(repo: str, names: Sequence[str], here: Mapping[str, Path]) -> Path:
    names = [name for name in names if _CHECKPOINT.fullmatch(name)]
    if "config.json" not in names:
        raise GgufRunError(
            f"hf:{repo} has neither GGUF files nor config.json: it is no model that can be run or converted"
        )
    if any(name.endswith(".safetensors") for name in names):
        names = [name for name in names if ".bin" not in name]
    return _fetch(repo, names, here)[0].parent


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
    """Fetch a file. It is checked against its size and its sha256; a file of which the hub tells none is said."""
    hub = _package(f"hf:{repo}")
    url, file = hub.hf_hub_url(repo, name), f"hf:{repo}/{name}"
    host = urlsplit(url).netloc
    try:
        told = hub.get_hf_file_metadata(url)
        size, commit, tag = told.size, told.commit_hash or "", told.etag or ""
        if not _COMMIT.fullmatch(commit) or not _TAG.fullmatch(tag):  # both become names of files
            raise GgufRunError(f"the hub names its version {commit!r} and {tag!r}, which are no hashes")
        message(f"fetching {file} from {host} ({size_text(size, 1) if size else 'size unknown'}) into {hub_cache()}")
        _drop_long_part(repo, tag, size)
        path = Path(hub.hf_hub_download(repo, name, tqdm_class=_bounded(hub.utils.tqdm, size)))
    except Exception as error:
        # The HTTP library behind huggingface_hub, and so its errors, differs between versions.
        others = _others(repo, name) if isinstance(error, hub.errors.EntryNotFoundError) else ""
        raise GgufRunError(f"cannot fetch {file} from {host}: {_reason(error)}{others}") from error
    if _SHA256.fullmatch(tag):
        _verify(path, tag, f"{file} from {host}")
    else:
        message(f"{file} is unverified: the hub tells no sha256 of it")
    return path


def _bounded(bar: Any, size: int | None) -> Any:
    """Return a class of huggingface_hub's progress bars that ends a download that is longer than its size."""
    most = MAX_UNKNOWN_BYTES if size is None else size

    class Bounded(bar):
        n_arrived = 0.0

        def update(self, n: float | None = 1) -> Any:
            self.n_arrived += n or 0
            if self.n_arrived > most:
                announced = "it announced" if size is not None else "are taken where it announces no size"
                raise GgufRunError(f"the server sends more than the {most} bytes that {announced}")
            return super().update(n)

    return Bounded


def _drop_long_part(repo: str, tag: str, size: int | None) -> None:
    """Remove the part of an earlier download if it is no beginning of the file: going on from it fails for ever."""
    part = hub_cache() / f"models--{repo.replace('/', '--')}" / "blobs" / f"{tag}.incomplete"
    with suppress(OSError):
        if size is None or part.stat().st_size > size:
            part.unlink()


def _verify(path: Path, sha256: str, file: str) -> None:
    """Check a file that was fetched. GgufRunError, and the file is removed, if its sha256 is another one."""
    with path.open("rb") as data:
        found = hashlib.file_digest(data, "sha256").hexdigest()
    if found != sha256:
        for name in {path, path.resolve()}:
            name.unlink(missing_ok=True)
        raise GgufRunError(f"{file} is damaged: its sha256 is {found}, expected {sha256}; run the command again")


def _others(repo: str, name: str) -> str:
    """Return what the user may have meant by a file that is not there."""
    try:
        models = models_among(_ask(repo), repo)
    except Exception:  # we are reporting an error already
        return ""
    near = get_close_matches(name, models, n=1, cutoff=0.75)
    return f"; did you mean hf:{repo}/{near[0]}?" if near else f"; it has {', '.join(models) or 'no GGUF files'}"


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    for kind, reason in (  # order counts: the first kinds are special cases of later ones
        (errors.GatedRepoError, "access must be asked for on the hub; then set HF_TOKEN to a token of that account"),
        (errors.RepositoryNotFoundError, "no such repository: check the spelling; if it is private, set HF_TOKEN"),
        (errors.EntryNotFoundError, "no such file in the repository"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set"),
    ):
        if isinstance(error, kind):
            return reason
    if isinstance(error, GgufRunError):
        return str(error)
    if getattr(getattr(error, "response", None), "status_code", 0) in (401, 403):
        return "access denied; set HF_TOKEN to a valid token"
    if type(error).__name__ in ("ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError"):  # httpx, requests
        return f"no connection ({error}): check the network"
    return f"{str(error).strip() or type(error).__name__}; run the command again"
