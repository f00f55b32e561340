"""What people install: the sdist, the wheel made from it, and the wheel run outside the checkout."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from documents import ROOT, SCRIPTS

FOLDERS = ("formats", "kernels_cpu", "kernels_gpu", "models", "runtime")
TOP = ("__init__.py", "__main__.py", "compat.py", "py.typed")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_{}(sys.argv[1]))"


def sources(folder: Path) -> set[str]:
    """Files of the package, relative to the folder that holds the five folders."""
    paths = [path for name in FOLDERS for path in (folder / name).rglob("*.py")]
    paths += [path for path in (folder / "runtime/serve/page").rglob("*") if path.is_file()]
    return {*TOP, *(path.relative_to(folder).as_posix() for path in paths)}


def files(folder: Path) -> set[str]:
    """All files of a checkout that git does not ignore, or of an unpacked sdist, without what tools have made."""
    if (folder / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=60).stdout
        return {name for name in listed.split("\0") if (folder / name).is_file()}
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    made = re.compile(r"(^|/)(\..*_cache|\.venv|\.hypothesis|build|__pycache__|[^/]*\.egg-info)(/|$)")
    return {name for name in names if not made.search(name)}


def build(kind: str, folder: Path, out: Path) -> Path:
    command = [sys.executable, "-c", BUILD.format(kind), str(out)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stdout.split()[-1]


def copied(checkout: Path) -> Path:
    """Copy all files of this checkout; return the folder."""
    for name in files(ROOT):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    return checkout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist of a copy of the checkout."""
    folder = tmp_path_factory.mktemp("package")
    archive = build("sdist", copied(folder / "checkout"), folder)
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel that pip makes where it has only the sdist."""
    return build("wheel", sdist, sdist.parent)


def test_sdist_is_the_repository(sdist: Path) -> None:
    assert files(sdist) - {"PKG-INFO", "setup.cfg"} == files(ROOT) - {"PKG-INFO", "setup.cfg"}


def test_sdist_tests_itself(sdist: Path) -> None:
    """Tests of all kinds that read other files: documents, pictures, benchmarks, data beside a test, helpers."""
    subprocess.run(["make", "build/typing/gguf_run"], cwd=sdist, check=True, timeout=60)
    assert {path.name for path in (sdist / "build/typing/gguf_run").iterdir()} == {*TOP, *FOLDERS}
    tests = ["tests/test_project.py", "tests/runtime/sampling/test_sampler.py"]
    names = "links or tables or pictures or sampler"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests, "-k", names]
    environment = os.environ | {"PYTHONPATH": str(sdist / "build/typing")}
    done = subprocess.run(command, cwd=sdist, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout


def test_an_index_shows_no_dead_links(sdist: Path) -> None:
    text = (sdist / "PKG-INFO").read_text()
    text = text[text.index("\n# gguf-run") :]
    assert [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link] == []
    assert "running and sampling (`docs/running.md`)" in text
    assert "see limits" in text
    assert "](https://" not in (ROOT / "README.md").read_text() or "](https://" in text


def test_wheel_holds_every_source(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name.removeprefix("gguf_run/") for name in archive.namelist() if name.startswith("gguf_run/")}
    assert names == sources(ROOT)


def test_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*command, str(wheel)], check=True, timeout=240)
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-m", "gguf_run", "--version"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.startswith("gguf-run, version"), done.stderr
    for script, place in SCRIPTS.items():
        assert (site / "bin" / script).is_file()
        module, _, function = place.partition(":")
        code = f"import {module} as m, sys; print(m.__file__); sys.argv = ['{script}', '--version']; m.{function}()"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )
        file, version = done.stdout.splitlines()
        assert Path(file).is_relative_to(site), done.stderr
        assert version.startswith(script)


USER = """\
from gguf_run import Model, __version__
from gguf_run.compat import Llama

reveal_type(Model.load("x", n_ctx=5).complete([1, 2], temperature=0.5).text)
reveal_type(__version__)
reveal_type(Llama("x").n_ctx())
Model.load("x", n_cxt=5)
Model.load("x").generate("a", temprature=0.5)
"""


def test_type_checkers_follow_an_editable_install(tmp_path: Path) -> None:
    """A path file leads to links; a new file is there at once. (pyright reads path files as mypy does.)"""
    pytest.importorskip("mypy")
    checkout = copied(tmp_path / "checkout")
    with zipfile.ZipFile(build("editable", checkout, tmp_path)) as archive:
        (name,) = (name for name in archive.namelist() if ".dist-info/" not in name)
        target = archive.read(name).decode()
    assert name.endswith(".pth")
    assert {path.name for path in Path(target.strip(), "gguf_run").iterdir()} == {*TOP, *FOLDERS}
    (checkout / "runtime/new.py").touch()
    assert Path(target.strip(), "gguf_run/runtime/new.py").is_file()
    venv.create(tmp_path / "venv", symlinks=os.name != "nt")
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    purelib = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    Path(purelib, name).write_text(target)
    (tmp_path / "user.py").write_text(USER)
    command = [sys.executable, "-m", "mypy", "--python-executable", str(python), "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    found = [line.split(": ", 2)[-1] for line in done.stdout.splitlines()]
    assert [line for line in found if line.startswith("Revealed")] == [
        f'Revealed type is "{t}"' for t in ("str", "str", "int")
    ]
    assert [line.split(";")[0] for line in found if line.startswith("Unexpected")] == [
        'Unexpected keyword argument "n_cxt" for "load" of "Model"',
        'Unexpected keyword argument "temprature" for "generate" of "Model"',
    ]


def test_an_editable_install_where_links_cannot_be_made(tmp_path: Path) -> None:
    checkout = copied(tmp_path / "checkout")
    (checkout / "build").mkdir()
    (checkout / "build/typing").touch()
    with zipfile.ZipFile(build("editable", checkout, tmp_path)) as archive:
        assert any(name.endswith("_finder.py") for name in archive.namelist())
