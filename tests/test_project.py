"""The project's own rules: packaging, imports, documents. Each check is also shown something that it must reject."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import plots
import pytest
import tables
from documents import DOCUMENTS, PYPROJECT, ROOT, SCRIPTS, command_of, commands_in, options_of

PACKAGES = tuple(PYPROJECT["tool"]["setuptools"]["packages"])
FOLDERS = tuple(name.removeprefix("gguf_run.") for name in PACKAGES if name.count(".") == 1)
SOURCES = tuple(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))


def run_python(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def imports(source: str, *, everywhere: bool) -> Iterator[str]:
    """Yield the dotted names that a source imports; everywhere: those inside functions too."""
    tree = ast.parse(source)
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(path: Path) -> str:
    """The dotted name of a source, or of a folder."""
    path = path.parent if path.name == "__init__.py" else path
    return ".".join(("gguf_run", *path.relative_to(ROOT).with_suffix("").parts))


def has_torch(path: Path) -> bool:
    """Whether a source may import torch: only who asks for a GPU or for training imports such sources."""
    parts = path.relative_to(ROOT).parts
    return parts[0] == "kernels_gpu" or parts[:2] == ("runtime", "train")


def test_all_sources_are_packaged() -> None:
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(FOLDERS)
    assert {"gguf_run", *(module_of(path.parent) for path in SOURCES)} == set(PACKAGES)
    assert all((path.parent / "__init__.py").is_file() for path in SOURCES)
    assert f"FOLDERS  := {' '.join(FOLDERS)}\n" in (ROOT / "Makefile").read_text()


def test_modules_need_core_dependencies_only() -> None:
    """What a plain `pip install gguf-run` lacks may be imported late, never at the top.

    kernels_gpu, training and the server need their extras in any case.
    """
    project = PYPROJECT["project"]
    core, serve = (
        {re.match(r"[\w-]+", line).group() for line in lines}  # type: ignore[union-attr]
        for lines in (project["dependencies"], project["optional-dependencies"]["serve"])
    )
    allowed = core | {"gguf_run", "llvmlite"} | sys.stdlib_module_names  # llvmlite comes with numba
    for path in SOURCES:
        if not has_torch(path):
            found = {name.split(".")[0] for name in imports(path.read_text(), everywhere=False)}
            assert found <= allowed | (serve if path.parent.name == "serve" else set()), path


def test_numba_decorators_come_from_one_place() -> None:
    """Only formats/compiler/resolve.py knows the options and the cache. `import numba` would hide a decorator."""
    banned = {"numba", *(f"numba.{name}" for name in ("njit", "jit", "cfunc", "vectorize", "guvectorize"))}
    users = {path.name for path in SOURCES if banned & set(imports(path.read_text(), everywhere=True))}
    assert users == {"resolve.py"}


def test_cpu_modules_never_load_torch() -> None:
    """Not through a dependency either."""
    names = ", ".join(module_of(path) for path in SOURCES if not has_torch(path))
    code = f"import sys, {names}; print([name for name in ('torch', 'triton', 'transformers') if name in sys.modules])"
    assert run_python(code).strip() == "[]"


def make_empty(package: Path) -> None:
    """Make all sources, without content."""
    for path in (*SOURCES, ROOT / "__init__.py"):
        to = package / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.touch()


def linted(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-logo"]
    return subprocess.run(
        [*command, "--no-cache", "--config", str(ROOT / "pyproject.toml")],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("formats/gguf/a.py", "import gguf_run.models"),
        ("models/backend.py", "import gguf_run.kernels_cpu"),
        ("models/backend.py", "import numba"),
        ("kernels_cpu/rows/a.py", "import gguf_run.kernels_gpu"),
        ("runtime/load/a.py", "import torch"),
        ("formats/compiler/a.py", "def f():\n    import gguf_run.formats.blocks"),
        ("kernels_cpu/panels/a.py", "import gguf_run.kernels_cpu.matmul"),
        ("kernels_gpu/rows/a.py", "import gguf_run.kernels_gpu.matmul"),
        ("runtime/info/a.py", "import gguf_run.runtime.cli"),
        ("runtime/chat/a.py", "import gguf_run.runtime.engine"),
    ],
)
def test_import_linter_rejects(tmp_path: Path, file: str, line: str) -> None:
    """A linter that sees no files is content too: show it each kind of forbidden import."""
    pytest.importorskip("importlinter")
    package = tmp_path / "gguf_run"
    make_empty(package)
    assert "0 broken" in linted(tmp_path).stdout
    (package / file).write_text(f"{line}\n")
    assert "1 broken" in linted(tmp_path).stdout


@pytest.mark.parametrize("late", [False, True])
def test_import_linter_rejects_circles(tmp_path: Path, late: bool) -> None:
    pytest.importorskip("importlinter")
    make_empty(tmp_path / "gguf_run")
    room = tmp_path / "gguf_run/runtime/chat"
    (room / "a.py").write_text("import gguf_run.runtime.chat.b\n")
    indent = "def f():\n    " if late else ""
    (room / "b.py").write_text(f"{indent}import gguf_run.runtime.chat.a\n")
    assert "1 broken" in linted(tmp_path).stdout


@pytest.mark.parametrize("room", ["formats", "formats/blocks", "kernels_cpu/rows/deeper"])
def test_kernel_cache_follows_sources_of_helpers(tmp_path: Path, room: str) -> None:
    """An edit in one file recompiles a cached kernel of another file that calls it (numba alone would not)."""
    package = tmp_path / "gguf_run"
    (package / room).mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "formats/compiler", package / "formats/compiler")
    for name in ("errors", "atomic"):
        shutil.copy(ROOT / f"formats/{name}.py", package / f"formats/{name}.py")
    (package / "__init__.py").touch()  # else the installed package is found first
    prelude = "from gguf_run.formats.compiler.jit import njit\n"
    module = f"gguf_run.{room.replace('/', '.')}.helper"
    kernel = f"from {module} import helper\n@njit\ndef kernel(x):\n    return helper(x) * 10\n"
    (package / "formats/kernel.py").write_text(prelude + kernel)
    code = "import sys; from gguf_run.formats.kernel import kernel; print(kernel(1), 'numba' in sys.modules)"

    def kernel_of(helper_adds: int) -> list[str]:
        (package / room / "helper.py").write_text(f"{prelude}@njit\ndef helper(x):\n    return x + {helper_adds}\n")
        # Two edits within a second look alike to Python's own cache of bytecode.
        environment = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        return run_python(code, XDG_CACHE_HOME=str(tmp_path / "cache"), **environment).split()

    assert kernel_of(helper_adds=1) == ["20", "True"]
    assert kernel_of(helper_adds=1) == ["20", "False"]
    assert kernel_of(helper_adds=2) == ["30", "True"]


def test_kernels_compile_without_a_writable_cache() -> None:
    code = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    from gguf_run.formats.compiler.jit import njit\n"
        "    three = njit(lambda a, b: a + b)(1, 2)\n"
        "print(three, len(caught), 'XDG_CACHE_HOME' in str(caught[0].message))\n"
    )
    assert run_python(code, XDG_CACHE_HOME="/dev/null").split() == ["3", "1", "True"]


def test_commands_in_finds_options() -> None:
    text = (
        '`--chat`\n```sh\n$ bin/gguf-run m.gguf -p "a --not-this" \\\n  --seed=1 | head -3\n```\n`gguf-info M [--json]`'
    )
    assert list(commands_in(text)) == [("gguf-run", ["-p", "--seed"]), ("gguf-info", ["--json"])]


def test_commands_in_finds_subcommands() -> None:
    assert list(commands_in("`gguf-eval kl m.gguf --chunks 4`")) == [("gguf-eval kl", ["--chunks"])]


@pytest.mark.parametrize("document", [*DOCUMENTS, "Makefile"])
def test_documented_commands_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    if document == "Makefile":
        text = f"```\n{text}```"
    for script, options in commands_in(text):
        assert set(options) <= options_of(script), script


def test_readme_names_every_command() -> None:
    assert {script.split()[0] for script, _ in commands_in((ROOT / "README.md").read_text())} == set(SCRIPTS)


def all_scripts() -> Iterator[str]:
    """Every command: "gguf-run", "gguf-eval kl"."""
    for script in SCRIPTS:
        command = command_of(script)
        yield from (f"{script} {name}" for name in command.commands) if isinstance(command, click.Group) else (script,)


def test_documents_name_every_option() -> None:
    """Each option, under one of its names, anywhere in the documents: for many are those of several commands."""
    text = "\n".join((ROOT / document).read_text() for document in DOCUMENTS)
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text)) | {"--help", "--version"}
    for script in all_scripts():
        for parameter in command_of(script).params:
            names = {*parameter.opts, *parameter.secondary_opts}
            assert isinstance(parameter, click.Argument) or names & known, f"{script}: {names} is not documented"


def links_in(text: str) -> set[str]:
    """Relative links and pictures of a Markdown text, with their anchors."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    return {link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}


def anchors_of(text: str) -> set[str]:
    """What GitHub calls the headings of a Markdown text."""
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_resolve(document: str) -> None:
    for link in links_in((ROOT / document).read_text()):
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.is_file(), link
        assert not anchor or anchor in anchors_of(target.read_text()), link


def test_links_in_finds_links() -> None:
    text = "[a](docs/a.md#b-c) ![p](p.svg) [w](https://x.org) `[no](no.md)`"
    assert links_in(text) == {"docs/a.md#b-c", "p.svg"}
    assert anchors_of("# gguf-run: ask, `chat`\n```\n# no\n```\n## B c") == {"gguf-run-ask-chat", "b-c"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tables_are_as_measured(document: str) -> None:
    """Tables between marks are what benchmarks/tables.py makes of docs/data."""
    text = (ROOT / document).read_text()
    assert tables.filled(text) == text, "run benchmarks/tables.py"


def test_tables_are_seen() -> None:
    marked = "<!-- table: speed_short -->\nold\n<!-- end -->"
    assert "SmolLM2" in tables.filled(marked)


@pytest.mark.parametrize("name", plots.PICTURES)
def test_pictures_are_as_measured(name: str) -> None:
    assert (ROOT / f"docs/images/{name}.svg").read_text() == plots.PICTURES[name](), "run benchmarks/plots.py"
