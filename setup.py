"""Tells setuptools where the package gguf_run lies, and what a package index shows; all else is in pyproject.toml."""

import os
import re
import sys
from pathlib import Path

from setuptools import setup

FARM = Path("build/typing")
ENTRIES = (
    "__init__.py", "__main__.py", "compat.py", "py.typed", "formats", "kernels_cpu", "kernels_gpu", "models", "runtime",
)  # fmt: skip
NOTE = "\n\nThe source archive has the pages and pictures that are named here, such as `docs/python.md`.\n"


def package_dir() -> dict[str, str]:
    """Return where packages are: in this folder, which is gguf_run itself.

    An editable install needs a folder that holds `gguf_run`, because editors and type checkers follow paths, not import
    hooks: build/typing/gguf_run is made of links to this folder. Where links cannot be made (Windows may forbid it),
    setuptools installs its hook.
    """
    if "editable_wheel" in sys.argv:
        try:
            (FARM / "gguf_run").mkdir(parents=True, exist_ok=True)
            for name in ENTRIES:
                link = FARM / "gguf_run" / name
                if not link.exists():
                    link.unlink(missing_ok=True)  # a link to nothing
                    link.symlink_to(Path("../../..", name), target_is_directory=Path(name).is_dir())
        except OSError:
            pass
        else:
            return {"": os.fspath(FARM)}
    return {"gguf_run": "."}


def description() -> str:
    """Return README.md without links and pictures that lead to files beside it: an index does not have these files."""

    def named(match: re.Match[str]) -> str:
        text, target = match[2], match[3]
        if "://" in target:
            return match[0]
        is_said = target.startswith("#") or text == target
        return text if is_said else f"{text} (`{target}`)"

    parts = re.split(r"(```.*?```)", Path("README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    parts[::2] = [re.sub(r"(!?)\[([^\]]+)\]\(([^)\s]+)\)", named, part) for part in parts[::2]]
    return "".join(parts).rstrip() + NOTE


setup(
    script_name="setup.py",  # this file is not a module of gguf_run
    package_dir=package_dir(),
    long_description=description(),
    long_description_content_type="text/markdown",
)
