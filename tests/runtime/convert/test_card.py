"""What names of models tell, as files on the hub are called."""

import pytest

from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.gguf.tensors import TensorInfo
from gguf_run.runtime.convert.card import NameParts, file_name, name_parts, size_label, titled


@pytest.mark.parametrize(
    ("id", "n_params", "expected"),
    [
        (
            "HuggingFaceTB/smollm2-135M-8k-lc100k-mix1-ep2",
            135_000_000,
            ("smollm2-135M-8k-lc100k-mix1-ep2", "HuggingFaceTB", "smollm2", "8k-lc100k-mix1-ep2", None, "135M"),
        ),
        ("gemma-3-270m", 268_000_000, ("gemma-3-270m", None, "gemma-3", None, None, "270M")),
        (
            "meta-llama/Llama-3.2-1B-Instruct",
            1_236_000_000,
            ("Llama-3.2-1B-Instruct", "meta-llama", "Llama-3.2", "Instruct", None, "1B"),
        ),
        (
            "mistralai/Mixtral-8x7B-Instruct-v0.1",
            0,
            ("Mixtral-8x7B-Instruct-v0.1", "mistralai", "Mixtral", "Instruct", "v0.1", "8x7B"),
        ),
        ("Phi-3-mini-128k-instruct", 3_800_000_000, (None, None, "Phi-3", "128k-instruct", None, "mini")),
        ("bigscience/bloom-7b1", 0, ("bloom-7b1", "bigscience", "bloom", None, None, "7.1B")),
        ("gpt-oss", 0, ("gpt-oss", None, None, None, None, None)),
        ("model-1.5", 0, ("model-1.5", None, "model", None, "1.5", None)),
        ("A name in words", 7, ("A name in words", None, None, None, None, None)),
        ("./folder-7B", 0, ("folder-7B", None, "folder", None, None, "7B")),
    ],
)
def test_parts_of_names(id: str, n_params: int, expected: tuple[str | None, ...]) -> None:
    parts = name_parts(id, n_params)
    assert parts == NameParts(expected[0] or parts.name, *expected[1:])


def test_titles_and_sizes() -> None:
    assert titled("smollm2-135M-8k-lc100k-v1.2") == "Smollm2 135M 8k Lc100K v1.2"

    def tensor(name: str, *ne: int) -> TensorInfo:
        return TensorInfo(name, ne, type_by_name("F16"))

    assert size_label([tensor("token_embd.weight", 1000, 960)]) == "960K"
    assert size_label([tensor("a.weight", 1000, 1000, 1_236)]) == "1.2B"
    assert size_label([tensor("a.weight", 1000, 10_000), tensor("blk.0.ffn_up_exps.weight", 1000, 5000, 8)]) == "8x15M"


def test_file_names() -> None:
    name = {"general.name": "A/b c"}
    assert file_name(name, "Q4_K_M") == "A-b-c-Q4_K_M.gguf"
    parts = {
        "general.basename": "Llama",
        "general.size_label": "1B",
        "general.finetune": "Chat",
        "general.version": "v2",
    }
    assert file_name(name | parts, "F16") == "Llama-1B-Chat-v2-F16.gguf"
    assert file_name(name | parts, None) == "Llama-Chat-v2-vocab.gguf"
    assert file_name({"general.name": "../../x"}, "F16") == "-..-x-F16.gguf"
