"""LoadOptions.lora: how adapters and their scales are named, and what a model answers with them."""

from pathlib import Path
from typing import Any

import pytest
from adapter_files import random_pairs, write_adapter
from click.testing import CliRunner
from tinymodel import Tiny, write_tiny

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.cli.run import main
from gguf_run.runtime.load.adapters import with_scales
from gguf_run.runtime.load.load_model import load_model
from gguf_run.runtime.load.options import LoadOptions
from gguf_run.runtime.model import Model

PAIRS = random_pairs(Tiny(), {"attn_q": 4, "ffn_down": 4})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "model.gguf")
    write_adapter(tmp_path / "a.gguf", PAIRS)
    return tmp_path / "model.gguf"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (["a.gguf"], {"a.gguf": 1.0}),
        (["a.gguf:0.5", "b:c.gguf"], {"a.gguf": 0.5, "b:c.gguf": 1.0}),
        (["C:\\a.gguf", "x:-2e-1"], {"C:\\a.gguf": 1.0, "x": -0.2}),
        ([Path("a:3"), Path("b")], {"a": 3, "b": 1.0}),
    ],
)
def test_scales(given: list[Any], found: dict[str, float]) -> None:
    assert with_scales(given) == found


def test_wrong_options(model: Path) -> None:
    a, tiny = str(model.with_name("a.gguf")), write_adapter(model.with_name("b.gguf"), PAIRS, "qwen2")
    cases = [
        ([a, f"{a}:2"], "a.gguf: is given twice: name it once"),
        ([f"{a}:nan"], "a.gguf has the scale nan; allowed are numbers from"),
        ([str(model)], "model.gguf: general.type is \"missing\", an adapter"),
        ([str(tiny)], 'b.gguf: general.architecture is "qwen2", an adapter .LoRA. for this model has "llama"'),
        (["nowhere.gguf"], "nowhere.gguf"),
    ]  # fmt: skip
    for lora, words in cases:
        with pytest.raises(GgufRunError, match=words):
            load_model(model, LoadOptions(device="cpu", lora=lora))
    result = CliRunner().invoke(main, [str(model), "--device", "cpu", "--raw", "-p", "the", "--lora", str(tiny)])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


def test_a_model_with_adapters(model: Path) -> None:
    """Each scale gives other logits, and its session belongs to no other."""
    a, session = model.with_name("a.gguf"), model.with_name("session")
    logits, needed = [], []
    for lora in ((), (a,), (f"{a}:2",)):
        with Model.load(model, device="cpu", lora=lora) as loaded:
            if logits:
                with pytest.raises(GgufRunError):
                    loaded.load_session(session)
            logits.append(loaded.logits([5, 60, 200]))
            needed.append(loaded.decoder.nbytes()["weights"])
            list(loaded.generate("the and", max_tokens=2))
            loaded.save_session(session)
            loaded.load_session(session)
    assert all((logits[i] != logits[j]).any() for i, j in ((0, 1), (0, 2), (1, 2)))
    assert needed[0] < needed[1] == needed[2]
