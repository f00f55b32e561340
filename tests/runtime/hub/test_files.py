"""Which file of a repository `hf:owner/repo[:TYPE]` means."""

import pytest

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.hub.files import choose, models_among, pick, type_of


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen2.5-7B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("qwen2.5-7b-instruct-q4_k_m-00001-of-00002.gguf", "Q4_K_M"),
        ("Llama-3.2-1B-Instruct-UD-IQ1_S.gguf", "UD-IQ1_S"),
        ("UD-Q2_K_XL/DeepSeek-R1-UD-Q2_K_XL-00001-of-00005.gguf", "UD-Q2_K_XL"),
        ("Mistral-7B.i1-IQ3_XXS.gguf", "IQ3_XXS"),
        ("gemma-3-1b-it-q4_0.gguf", "Q4_0"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("model_bf16.gguf", "BF16"),
        ("model.Q8_0-v2.gguf", "Q8_0"),
        ("TriLM_3.9B-TQ2_0.gguf", "TQ2_0"),
        ("Phi-3-mini-4k-instruct-fp16.gguf", "FP16"),
        ("BF16/model-00001-of-00003.gguf", "BF16"),
        ("model-q4.gguf", "Q4"),
        ("Qwen3-0.6B.gguf", ""),
    ],
)
def test_type_of(name: str, expected: str) -> None:
    assert type_of(name) == expected


def test_models_among() -> None:
    """Without what lies beside them, one name for a split model, none for one of which a part is missing."""
    split = [f"a-Q8_0-{number:05d}-of-00002.gguf" for number in (1, 2)]
    names = [*split, "a-Q4_0.gguf", "mmproj-a-f16.gguf", "a.imatrix.gguf", "README.md", "b-00001-of-00002.gguf"]
    assert models_among([*names, "c-00001-of-99999.gguf"]) == ["a-Q4_0.gguf", split[0]]


@pytest.mark.parametrize(
    "name",
    [
        "mtp-gemma-4-E4B-it-qat-Q4_K_M.gguf", "MTP/model-Q4_K_M.gguf", "Llama-3.3-draft-Q4_K_M.gguf",
        "draft/Q4_K_M-00001-of-00001.gguf", "a.Drafter.Q4_K_M.gguf", "a-EAGLE3-Q4_K_M.gguf", "eagle/a-Q4_K_M.gguf",
        "a-Medusa_heads-Q4_K_M.gguf", "a-nextn.Q4_K_M.gguf", "speculator-a-Q4_K_M.gguf", "a-it-assistant-Q4_K_M.gguf",
        "a-LoRA-Q4_K_M.gguf", "adapter_model-Q4_K_M.gguf", "ggml-vocab-a.Q4_K_M.gguf", "a-vocab-only-Q4_K_M.gguf",
        "mmproj-a-Q4_K_M.gguf", "a.mmproj-Q4_K_M.gguf", "vision-projector-Q4_K_M.gguf", "clip-a-Q4_K_M.gguf",
        "control-vector-a-Q4_K_M.gguf", "a-imatrix-Q4_K_M.gguf",
    ],
)  # fmt: skip
def test_what_lies_beside_a_model_is_not_the_model(name: str) -> None:
    assert choose("o/r", None, [name, "a-Q8_0.gguf"]) == "a-Q8_0.gguf"
    assert choose("o/r", None, [name, "a.gguf"]) == "a.gguf"
    with pytest.raises(GgufRunError, match=r"no file of this type"):
        choose("o/r", "Q4_K_M", [name, "a-Q8_0.gguf"])


@pytest.mark.parametrize(
    ("repo", "names"),
    [
        ("o/Draftsman-7B", ["Draftsman-7B-Q4_K_M.gguf"]),
        ("o/Qwen2.5-Coder-DRAFT-0.6B", ["Qwen2.5-Coder-DRAFT-0.6B-Q4_K_M.gguf"]),
        ("o/small-ones", ["Qwen-draft-Q4_K_M.gguf"]),
        ("o/legal-assistant-GGUF", ["legal-assistant-Q4_K_M.gguf", "mmproj-legal-assistant-Q4_K_M.gguf"]),
        ("o/GLM-MTP-GGUF", ["GLM-MTP-Q4_K_M.gguf", "GLM-MTP-lora-Q4_K_M.gguf", "GLM-MTP-draft-Q4_K_M.gguf"]),
        ("o/tale-LoRA-merged", ["tale-LoRA-merged-Q4_K_M.gguf", "LoRA.mmproj-Q8_0.gguf"]),
    ],
)
def test_a_model_may_have_such_a_word_in_its_name(repo: str, names: list[str]) -> None:
    assert choose(repo, None, names) == names[0]


def test_a_repository_without_models() -> None:
    with pytest.raises(GgufRunError, match=r"has no GGUF files of models; by their names these are none: a-lora.gguf$"):
        choose("o/r", None, ["a-lora.gguf"])


@pytest.mark.parametrize(
    ("wanted", "types", "expected"),
    [
        (None, "F16 Q8_0 Q4_K_M Q4_K_S", "Q4_K_M"),
        (None, "F16 Q8_0 Q4_K_S UD-Q4_K_XL", "UD-Q4_K_XL"),
        (None, "UD-Q4_K_M Q4_K_S", "UD-Q4_K_M"),
        (None, "F16 Q8_0 Q2_K", "Q8_0"),
        (None, "IQ1_S IQ2_M", "IQ1_S"),
        ("q4_k_m", "Q4_K_M UD-Q4_K_M", "Q4_K_M"),
        ("q4_k_m", "Q4_K_S UD-Q4_K_M", "UD-Q4_K_M"),
        ("UD-Q4_K_M", "Q4_K_M UD-Q4_K_M", "UD-Q4_K_M"),
        ("Q4_K", "Q4_K_M", None),
        (None, "", None),
    ],
)
def test_pick(wanted: str | None, types: str, expected: str | None) -> None:
    names = [f"model-{name}.gguf" for name in types.split()]
    assert pick(names, wanted) == ([f"model-{expected}.gguf"] if expected else [])


def test_choose(capsys: pytest.CaptureFixture[str]) -> None:
    assert choose("o/r", None, ["whatever.gguf", "mmproj.gguf"]) == "whatever.gguf"
    assert capsys.readouterr().err == ""
    assert choose("o/r", None, ["a-Q8_0.gguf", "a-Q5_0.gguf"]) == "a-Q5_0.gguf"
    assert capsys.readouterr().err == "hf:o/r has no Q4_K_M: taking a-Q5_0.gguf (it has Q5_0, Q8_0)\n"
    with pytest.raises(GgufRunError, match=r"hf:o/r:Q3_K: no file of this type in the repository; it has Q5_0, Q8_0"):
        choose("o/r", "Q3_K", ["a-Q8_0.gguf", "a-Q5_0.gguf"])
    with pytest.raises(GgufRunError, match=r"several such files: name one: hf:o/r/a-Q8_0.gguf, hf:o/r/b-Q8_0.gguf"):
        choose("o/r", "Q8_0", ["a-Q8_0.gguf", "b-Q8_0.gguf"])
    with pytest.raises(GgufRunError, match=r"has no GGUF files of models$"):
        choose("o/r", "Q8_0", ["README.md"])
    with pytest.raises(GgufRunError, match="gguf-run hf:o/r --quantize Q8_0, or gguf-convert"):
        choose("o/r", "Q8_0", ["model.safetensors", "config.json"])
