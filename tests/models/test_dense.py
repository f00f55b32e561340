"""Decoders with one feed-forward network in a layer: logits of tiny random checkpoints are those of transformers."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from cpu_ops import cpu, error
from numpy_backend import NumpyBackend

from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder
from gguf_run.models.keys import Keys
from gguf_run.models.kv_moves import shift
from gguf_run.models.xielu import read_xielu
from gguf_run.runtime.convert.back.checkpoint import export_hf
from gguf_run.runtime.convert.open_checkpoint import open_checkpoint
from gguf_run.runtime.convert.stored.sources import gathered, rows, values

pytest.importorskip("torch")
pytest.importorskip("transformers")

_FREE = {"hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
_TIED = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}
_WINDOWS = {"num_hidden_layers": 4, "sliding_window": 8, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
_LLAMA31 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 72}
_SECTIONS = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]}

# name -> (transformers' model class, config beyond hf_tiny's)
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral3": ("Ministral3ForCausalLM", {**_FREE, "rope_parameters": _YARN}),
    "seed_oss": ("SeedOssForCausalLM", {**_FREE, "attention_bias": True}),
    "ernie4_5": ("Ernie4_5ForCausalLM", {**_FREE, "tie_word_embeddings": True}),
    "glm4": ("Glm4ForCausalLM", {**_FREE, "attention_bias": True}),
    "qwen3vl": (
        "Qwen3VLForConditionalGeneration",
        {"text_config": {**_FREE, "rope_parameters": _SECTIONS},
         "vision_config": {**_VISION, "deepstack_visual_indexes": [0]}},
    ),
    "hunyuan-dense": (
        "HunYuanDenseV1ForCausalLM",
        {**_FREE, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}},
    ),
    "arcee": ("ArceeForCausalLM", {**_TIED}),
    "nemotron": ("NemotronForCausalLM", {**_TIED}),
    "apertus": ("ApertusForCausalLM", {**_TIED, "rope_parameters": _LLAMA31}),
    "exaone4": ("Exaone4ForCausalLM", {**_TIED, **_WINDOWS}),
    "exaone4-full": ("Exaone4ForCausalLM", {**_TIED, "sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "cohere2": ("Cohere2ForCausalLM", {**_TIED, **_WINDOWS, "logit_scale": 0.25, "tie_word_embeddings": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    has_images = "vision_config" in TINY[name][1]
    with pytest.warns(UserWarning, match="are left out, the file is for text") if has_images else nullcontext():
        tiny.check(tmp_path, *TINY[name])


@pytest.mark.parametrize("name", ["glm4", "nemotron", "hunyuan-dense", "exaone4-full", "cohere2"])
def test_there_and_back(name: str, tmp_path: Path) -> None:
    tiny.make(tmp_path / "a", *TINY[name])
    with open_checkpoint(tmp_path / "a", name="x") as file:
        export_hf(file, tmp_path / "b")
        with open_checkpoint(tmp_path / "b", name="x") as again:
            kept = [{k: str(v) for k, v in f.metadata.items() if not k.startswith("general.")} for f in (file, again)]
            assert kept[0] == kept[1]
            assert {k: x.blocks().tobytes() for k, x in file.tensors.items()} == {
                k: x.blocks().tobytes() for k, x in again.tensors.items()
            }


def test_what_has_no_way_back(tmp_path: Path) -> None:
    tiny.make(tmp_path / "a", *TINY["apertus"])
    with (
        open_checkpoint(tmp_path / "a") as file,
        pytest.raises(UnsupportedError, match=r"apertus.* cannot be exported"),
    ):
        export_hf(file, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_keys_normed_after_the_rotation_can_be_shifted(tmp_path: Path) -> None:
    """In a model of one layer, keys and values depend on nothing but their own token and position."""
    name, own = TINY["hunyuan-dense"]
    tiny.make(tmp_path, name, {**own, "num_hidden_layers": 1})
    with tiny.opened(tmp_path) as (config, tensors):
        assert config.arch.qk_norm_after_rope
        decoder = Decoder(config, tensors, [cpu(2)], 128, cache_types=[CacheType("f32", "f32")])
        for _ in decoder.forward(tiny.IDS[:80]):
            pass
        assert shift(decoder.cache, 0, 32) == 48
        (actual,) = decoder.forward(tiny.IDS[80:81])
        expected = tiny.logits(config, tensors, NumpyBackend(np.float64), [49], tiny.IDS[32:81])[-1:]
    assert error(actual, expected) < 1e-5


def in_halves(tensor: Any, n_head: int, n_rot: int) -> Any:
    """Rows of heads whose first n_rot come in pairs, as two halves."""
    head = np.arange(tensor.ne[-1]).reshape(n_head, -1)
    index = np.concatenate([head[:, :n_rot:2], head[:, 1:n_rot:2], head[:, n_rot:]], axis=1).reshape(-1)
    return rows(tensor, index, tensor.ne) if len(tensor.ne) > 1 else values(tensor, lambda x: x[:, index])


def test_other_forms_of_a_file_mean_the_same(tmp_path: Path) -> None:
    """GLM-4: heads in the order of files with sections of positions, q, k and v in one tensor, a block that drafts."""
    tiny.make(tmp_path, *TINY["glm4"])
    with open_checkpoint(tmp_path) as file:
        tensors = file.tensors

        def float64_logits(tensors: Any, **metadata: Any) -> np.ndarray:
            more = {f"glm4.{key}": value for key, value in metadata.items()}
            config = ModelConfig.from_metadata({**file.metadata, **more}, tensors)
            return tiny.logits(config, tensors, NumpyBackend(np.float64), [9])

        expected = float64_logits(tensors)
        halved, joined = dict(tensors), dict(tensors)
        for block in ("blk.0.", "blk.1."):
            for name, n_head in ((f"{block}attn_q", 6), (f"{block}attn_k", 2)):
                for kind in ("weight", "bias"):
                    halved[f"{name}.{kind}"] = in_halves(tensors[f"{name}.{kind}"], n_head, 8)
            parts, name = [joined.pop(f"{block}attn_{name}.weight") for name in "qkv"], f"{block}attn_qkv.weight"
            joined[name] = gathered(name, parts, None, (72, sum(part.ne[1] for part in parts)))
        assert error(float64_logits(halved, **{"rope.dimension_sections": np.array([2, 1, 1, 0])}), expected) < 1e-12
        assert error(float64_logits(joined), expected) < 1e-12
        layers: dict[str, Any] = {"block_count": 3, "nextn_predict_layers": 1}
        drafts = {name.replace("blk.1.", "blk.2."): x for name, x in tensors.items() if name.startswith("blk.1.")}
        assert error(float64_logits({**tensors, **drafts}, **layers), expected) < 1e-12
        beside = {name: x for name, x in tensors.items() if not name.startswith("blk.")}
        with pytest.raises(UnsupportedError, match=r"only those blocks .* that draft tokens \(blk\.2\.\*, MTP\)"):
            float64_logits({**beside, **drafts}, **layers)


@pytest.mark.parametrize("value", [None, "x", np.array([1.0]), np.array([0.5, np.nan]), 1e3])
def test_numbers_of_an_activation_are_checked(value: Any) -> None:
    numbers = {"xielu.alpha_p": 0.8, "xielu.beta": 0.5, "xielu.eps": np.array([-1e-6, -1e-6])}
    read = read_xielu(Keys({**numbers, "xielu.alpha_n": np.array([0.7, 0.8, 0.9])}, "apertus"), 2)
    assert read[1] == pytest.approx((np.log1p(np.exp(0.8)), 0.5 + np.log1p(np.exp(0.8)), 0.5, -1e-6))
    with pytest.raises(FormatError, match=r"^xielu\.alpha_n is .*, must be 2 numbers from -80 to 80$"):
        read_xielu(Keys({**numbers, "xielu.alpha_n": value}, "apertus"), 2)
