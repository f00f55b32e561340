"""What people install: the sdist, the wheel made from it, and the wheel run outside the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from documents import ROOT, SCRIPTS

FOLDERS = ("formats", "kernels_cpu", "kernels_gpu", "models", "runtime")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_{}(sys.argv[1]))"


def sources(folder: Path) -> set[str]:
    """Python files and py.typed of the five folders, relative to the folder that holds these."""
    paths = [path for name in FOLDERS for path in (folder / name).rglob("*") if path.suffix in (".py", ".typed")]
    return {path.relative_to(folder).as_posix() for path in paths}


def build(kind: str, folder: Path, out: Path) -> Path:
    command = [sys.executable, "-c", BUILD.format(kind), str(out)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip makes where it has only the sdist."""
    folder = tmp_path_factory.mktemp("package")
    checkout = folder / "checkout"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    sdist = build("sdist", checkout, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    assert sources(unpacked) == sources(ROOT)
    return build("wheel", unpacked, folder)


def test_wheel_holds_every_source(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name.removeprefix("gguf_run/") for name in archive.namelist() if name.startswith("gguf_run/")}
    assert names == sources(ROOT)


def test_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*command, str(wheel)], check=True, timeout=240)
    environment = os.environ | {"PYTHONPATH": str(site)}
    for script, place in SCRIPTS.items():
        assert (site / "bin" / script).is_file()
        module = place.partition(":")[0]
        code = f"import {module} as m, sys; print(m.__file__); sys.argv = ['{script}', '--version']; m.main()"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )
        file, version = done.stdout.splitlines()
        assert Path(file).is_relative_to(site), done.stderr
        assert version.startswith(script)
