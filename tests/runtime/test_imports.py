"""What one prompt on the CPU imports: a reader's way to the kernels, and time before the first token."""

import pytest
from documents import ROOT
from imports import imported
from tinymodel import write_tiny

MOST_MODULES, MOST_LINES = 76, 10_942


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Lines of each module that a prompt imports when all kernels are compiled."""
    model = tmp_path_factory.mktemp("imports") / "tiny.gguf"
    write_tiny(model)
    return imported([str(model), "--device", "cpu", "--raw", "-p", "the", "-n", "1"])


def test_a_prompt_imports_little(modules: dict[str, int]) -> None:
    assert len(modules) <= MOST_MODULES
    assert sum(modules.values()) <= MOST_LINES


def test_frozen_classes_are_quick_to_import(modules: dict[str, int]) -> None:
    """Each dataclass(frozen=True) on the way of a prompt takes 0.5 ms: formats/frozen.py has what takes 0.03."""
    paths = [ROOT / f"{name.replace('.', '/')}.py" for name in modules]
    slow = [path.name for path in paths if "\n@dataclass(frozen=True" in path.read_text()]
    assert slow == []


@pytest.mark.parametrize(
    "room", ["kernels_gpu", "kernels_cpu.vector.simd", "kernels_cpu.matmul.moe", "runtime.chat", "runtime.hub"]
)
def test_what_a_prompt_does_not_need(modules: dict[str, int], room: str) -> None:
    assert [name for name in modules if name.startswith(room)] == []
