from typing import Any

import click
import pytest

from gguf_run.formats.errors import OptionError
from gguf_run.runtime.cli.byte_size import byte_size
from gguf_run.runtime.cli.options import CTX_SIZE, RUNTIME_OPTIONS, to_load_options
from gguf_run.runtime.load.options import LoadOptions


def parse(*words: str) -> dict[str, Any]:
    """The parameters that a command with these options gets."""
    return click.Command("x", params=[CTX_SIZE, *RUNTIME_OPTIONS]).make_context("x", [*words]).params


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["-c", "64", "-t", "2"], {"n_ctx": 64, "n_threads": 2}),
        (["-dev", "cuda:1", "-ngl", "3", "-ncmoe", "1"], {"device": "cuda:1", "gpu_layers": "3", "n_cpu_moe": 1}),
        (["-ct", "q8_0", "--no-cache-rotation"], {"cache_type": "q8_0", "cache_rotation": False}),
        (["-ctv", "q4_0", "--cache-scales", "s.json"], {"cache_type": ("f16", "q4_0"), "cache_scales": "s.json"}),
    ],
)
def test_options_of_a_command(words: list[str], expected: dict[str, Any]) -> None:
    assert to_load_options(parse(*words)) == LoadOptions(**expected)


def test_fields_that_a_command_sets_come_first() -> None:
    """What is no field of LoadOptions is left out."""
    found = to_load_options(parse("-ct", "q8_0") | {"verbose": True}, cache_type="f32", observe=True)
    assert found == LoadOptions(cache_type="f32", observe=True)


def test_options_that_exclude_each_other() -> None:
    with pytest.raises(OptionError, match="--cache-type q8_0 sets K and V"):
        to_load_options(parse("-ct", "q8_0", "-ctk", "f16"))


def test_byte_size() -> None:
    assert [byte_size(text, "--x") for text in (None, "5", "2k", "3M", "1G")] == [0, 5, 2_000, 3_000_000, 10**9]
    for text in ("0", "-1", "1.5G", "G", "1T"):
        with pytest.raises(OptionError, match=f"--x {text}: must be a number of bytes"):
            byte_size(text, "--x")
