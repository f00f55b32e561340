"""The house rules that a program can check: sizes, circles, who imports whom, files that texts name."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import DOCUMENTS, ROOT

FOLDERS = ("formats", "kernels_cpu", "kernels_gpu", "models", "runtime")
SOURCES = tuple(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
MOST_LINES, MOST_FILE_LINES, MOST_DOORS = 53_946, 350, 20
MOST_FUNCTION_LINES = {"kernels_cpu": 90, "kernels_gpu": 90}  # elsewhere 60
# The name of a file in a text: helpers/real.py, but not unpack_*.py. Names with capitals stand for any file.
NAMED_FILE = re.compile(r"(?<![\w/*.}{-])((?:[a-z_][a-z0-9_-]*/)*[a-z_][a-z0-9_]*\.(?:py|md))\b")
EVERYWHERE = {"__init__.py"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def n_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_size_of_the_house() -> None:
    assert sum(map(n_lines, SOURCES)) <= MOST_LINES
    assert {name_of(path): n for path in SOURCES if (n := n_lines(path)) > MOST_FILE_LINES} == {}


def test_doors_of_runtime() -> None:
    entries = [path for path in (ROOT / "runtime").iterdir() if path.name != "__pycache__"]
    assert len([path for path in entries if path.is_dir() or path.suffix == ".py"]) <= MOST_DOORS


def test_path_of_a_prompt() -> None:
    """What one reads to follow a prompt to the kernel and back: the files that docs/how_it_works.md names."""
    text = (ROOT / "docs/how_it_works.md").read_text()
    walk = text[text.index("<!-- walk -->") : text.index("<!-- end of the walk -->")]
    files = {ROOT / name for name in re.findall(r"`([\w/]+\.py)`", walk)}
    assert len(files) <= 40
    assert sum(map(n_lines, files)) <= 7_500


def long_functions(source: str, most: int) -> list[tuple[str, int]]:
    """Names and lines of the functions that have more than `most` lines."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    lengths = [(node.name, (node.end_lineno or 0) - node.lineno + 1) for node in functions]
    return [(name, n) for name, n in lengths if n > most]


def test_functions_are_short() -> None:
    """ruff checks their complexity (C901)."""
    for path in SOURCES:
        most = MOST_FUNCTION_LINES.get(path.relative_to(ROOT).parts[0], 60)
        assert long_functions(path.read_text(), most) == [], path


def test_long_functions_are_found() -> None:
    source = "def f():\n    def g():\n        pass\n        pass\n    pass\n"
    assert long_functions(source, 2) == [("f", 5), ("g", 3)]


def texts(source: str) -> Iterator[str]:
    """Docstrings and comments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def missing_files(text: str, folder: Path) -> set[str]:
    """Names of files in a text that are neither in `folder`, in a folder above it, nor in the checkout."""
    places = [folder, *folder.parents]
    places = places[: places.index(ROOT) + 1]
    named = set(NAMED_FILE.findall(text)) - EVERYWHERE
    return {name for name in named if not any((place / name).is_file() for place in places)}


@pytest.mark.parametrize("folder", [*FOLDERS, "tests", "benchmarks"])
def test_files_that_sources_name_exist(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for text in texts(path.read_text()):
            assert missing_files(text, path.parent) == set(), name_of(path)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_documents_name_exist(document: str) -> None:
    path = ROOT / document
    code = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL))
    assert missing_files("\n".join(code), path.parent) == set()


def test_missing_files_are_found() -> None:
    folder = ROOT / "formats/blocks"
    assert missing_files("see types.py, blocks/unpack.py, formats/errors.py, unpack_*.py", folder) == set()
    assert missing_files("see dry.py and docs/none.md", folder) == {"dry.py", "docs/none.md"}
