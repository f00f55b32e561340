"""Helpers of kernels are imported when a kernel is compiled."""

import importlib
import sys
from pathlib import Path

import pytest

HELPER = """
from gguf_run.formats.compiler.jit import njit

TWO = 2

@njit
def double(x):
    return TWO * x
"""
KERNEL = """
from gguf_run.formats.compiler.deferred import COMPILING
from gguf_run.formats.compiler.jit import njit

if COMPILING:
    from a_helper import TWO, double

@njit
def kernel(x):
    return double(x) + TWO
"""


def test_helpers_are_imported_when_a_kernel_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_helper.py").write_text(HELPER)
    (tmp_path / "a_kernel.py").write_text(KERNEL)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("a_kernel")
    assert "a_helper" not in sys.modules
    assert not hasattr(module, "double")
    assert module.kernel(3) == 8
    assert "a_helper" in sys.modules
