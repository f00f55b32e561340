"""What one prompt on the CPU imports: a reader's way to the kernels, and time before the first token."""

import pytest
from imports import imported
from tinymodel import write_tiny

MOST_MODULES, MOST_LINES = 75, 10_000


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Lines of each module that a prompt imports when all kernels are compiled."""
    model = tmp_path_factory.mktemp("imports") / "tiny.gguf"
    write_tiny(model)
    return imported([str(model), "--device", "cpu", "--raw", "-p", "the", "-n", "1"])


def test_a_prompt_imports_little(modules: dict[str, int]) -> None:
    assert len(modules) <= MOST_MODULES
    assert sum(modules.values()) <= MOST_LINES


@pytest.mark.parametrize(
    "room", ["kernels_gpu", "kernels_cpu.vector.simd", "kernels_cpu.matmul.moe", "runtime.chat", "runtime.hub"]
)
def test_what_a_prompt_does_not_need(modules: dict[str, int], room: str) -> None:
    assert [name for name in modules if name.startswith(room)] == []
