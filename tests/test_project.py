"""The project's own rules: packaging, imports, documents. Each check is also shown something that it must reject."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import plots
import pytest
import tables

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = tuple(name.removeprefix("gguf_run.") for name in PYPROJECT["tool"]["setuptools"]["packages"])
SOURCES = tuple(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
SCRIPTS: dict[str, str] = PYPROJECT["project"]["scripts"]


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


def test_all_sources_are_packaged() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == set(FOLDERS)
    assert {path.parent for path in SOURCES} == {ROOT / folder for folder in FOLDERS}, "subfolders are not packaged"
    assert f"FOLDERS  := {' '.join(FOLDERS)}\n" in (ROOT / "Makefile").read_text()


def test_modules_need_core_dependencies_only() -> None:
    """What a plain `pip install gguf-run` lacks may be imported late, or in kernels_gpu, never at the top."""
    core = {re.match(r"[\w-]+", line).group() for line in PYPROJECT["project"]["dependencies"]}  # type: ignore[union-attr]
    allowed = core | {"gguf_run", "llvmlite"} | sys.stdlib_module_names  # llvmlite comes with numba
    for path in SOURCES:
        if path.parent.name != "kernels_gpu":
            found = {name.split(".")[0] for name in imports(path.read_text(), everywhere=False)}
            assert found <= allowed, path


def test_numba_decorators_come_from_one_place() -> None:
    """Only formats/jit.py knows the options and the cache; `import numba` would hide a decorator from this check."""
    banned = {"numba", *(f"numba.{name}" for name in ("njit", "jit", "cfunc", "vectorize", "guvectorize"))}
    users = {path.name for path in SOURCES if banned & set(imports(path.read_text(), everywhere=True))}
    assert users == {"jit.py"}


def test_cpu_modules_never_load_torch() -> None:
    """Not through a dependency either."""
    modules = [f"gguf_run.{path.parent.name}.{path.stem}" for path in SOURCES if path.parent.name != "kernels_gpu"]
    names = ", ".join(module.removesuffix(".__init__") for module in modules)
    code = f"import sys, {names}; print([name for name in ('torch', 'triton', 'transformers') if name in sys.modules])"
    assert run_python(code).strip() == "[]"


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
    ("folder", "line"),
    [
        ("formats", "import gguf_run.models"),
        ("models", "import gguf_run.kernels_cpu"),
        ("models", "import numba"),
        ("kernels_cpu", "import gguf_run.kernels_gpu"),
        ("runtime", "import torch"),
    ],
)
def test_import_linter_rejects(tmp_path: Path, folder: str, line: str) -> None:
    """A linter that sees no files is content too: show it each kind of forbidden import."""
    pytest.importorskip("importlinter")
    for name in FOLDERS:
        (tmp_path / "gguf_run" / name).mkdir(parents=True)
        (tmp_path / "gguf_run" / name / "__init__.py").touch()
    assert "0 broken" in linted(tmp_path).stdout
    (tmp_path / "gguf_run" / folder / "wrong.py").write_text(f"{line}\n")
    assert "1 broken" in linted(tmp_path).stdout


def test_kernel_cache_follows_sources_of_helpers(tmp_path: Path) -> None:
    """An edit in one file recompiles a cached kernel of another file that calls it (numba alone would not)."""
    formats = tmp_path / "gguf_run/formats"
    formats.mkdir(parents=True)
    for name in ("__init__", "errors", "cachedir", "jit", "machine_code"):
        shutil.copy(ROOT / f"formats/{name}.py", formats)
    prelude = "from gguf_run.formats.jit import njit\n"
    kernel = "from gguf_run.formats.helper import helper\n@njit\ndef kernel(x):\n    return helper(x) * 10\n"
    (formats / "kernel.py").write_text(prelude + kernel)
    code = "import sys; from gguf_run.formats.kernel import kernel; print(kernel(1), 'numba' in sys.modules)"

    def kernel_of(helper_adds: int) -> list[str]:
        (formats / "helper.py").write_text(f"{prelude}@njit\ndef helper(x):\n    return x + {helper_adds}\n")
        # Python's own cache does not see an edit within one second that leaves the size as it is.
        environment = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        return run_python(code, XDG_CACHE_HOME=str(tmp_path / "cache"), **environment).split()

    assert kernel_of(helper_adds=1) == ["20", "True"]
    assert kernel_of(helper_adds=1) == ["20", "False"]
    assert kernel_of(helper_adds=2) == ["30", "True"]


def test_kernels_compile_without_a_writable_cache() -> None:
    code = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    from gguf_run.formats.jit import njit\n"
        "    three = njit(lambda a, b: a + b)(1, 2)\n"
        "print(three, len(caught), 'XDG_CACHE_HOME' in str(caught[0].message))\n"
    )
    assert run_python(code, XDG_CACHE_HOME="/dev/null").split() == ["3", "1", "True"]


def commands_in(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (script, options) of each line of a text's code blocks and inline code that calls one of our scripts. A
    script with subcommands comes with the one that is called: "gguf-eval kl"."""
    code = re.findall(r"```\w*\n(.*?)```|`([^`\n]+)`", text, re.DOTALL)
    for line in (line for block in code for line in "".join(block).replace("\\\n", " ").splitlines()):
        line = re.sub(r"\"[^\"]*\"|'[^']*'|#.*", "", line)
        for command in re.split(r"[|;&]", line):
            if match := re.search(r"(?:^|[\s/])(gguf-\w+)((?:\s.*)?)$", command):
                name = match[1]
                if isinstance(command_of(name), click.Group) and (words := match[2].split()):
                    name = f"{name} {words[0]}"
                yield name, re.findall(r"(?<=[\s[])--?[a-z][\w-]*", match[2])


def test_commands_in_finds_options() -> None:
    text = (
        '`--chat`\n```sh\n$ bin/gguf-run m.gguf -p "a --not-this" \\\n  --seed=1 | head -3\n```\n`gguf-info M [--json]`'
    )
    assert list(commands_in(text)) == [("gguf-run", ["-p", "--seed"]), ("gguf-info", ["--json"])]


def test_commands_in_finds_subcommands() -> None:
    assert list(commands_in("`gguf-eval kl m.gguf --chunks 4`")) == [("gguf-eval kl", ["--chunks"])]


def command_of(script: str) -> click.Command:
    """The click command of "gguf-run", or of "gguf-eval kl". KeyError if there is none."""
    script, _, subcommand = script.partition(" ")
    module, _, function = SCRIPTS[script].partition(":")
    command = getattr(importlib.import_module(module), function)
    return command.commands[subcommand] if subcommand else command


def options_of(script: str) -> set[str]:
    command = command_of(script)
    return {"--help", *(name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts))}


DOCUMENTS = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))


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
