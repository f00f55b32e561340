"""Calibration files of KV caches: what they make of a model's caches, that they survive, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinymodel import Tiny, write_tiny

from gguf_run.formats.errors import FormatError, GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.models.config import ModelConfig
from gguf_run.runtime.load.cache_plan import plan_cache
from gguf_run.runtime.load.kv_scales import LayerScales, read_scales, write_scales


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    """2 layers, 2 KV heads of 64 numbers."""
    write_tiny(tmp_path / "m.gguf", Tiny(head_dim=64))
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        return ModelConfig.from_metadata(file.metadata, file.tensors)


def calibration(**changes: Any) -> dict[str, Any]:
    layers = [{"k_max": [1.0, 448.0], "v_max": [2, 0]}, {"k_max": [1, 1], "v_max": [1, 1], "k": "q8_0", "v": "q4_0"}]
    return {"format": "gguf-run kv-scales", "version": 1, "model": "m", "text": "t", "layers": layers} | changes


LAYER = calibration()["layers"][0]


def write_json(path: Path, facts: Any) -> Path:
    path.write_text(json.dumps(facts))
    return path


def test_a_calibration_file(config: ModelConfig, tmp_path: Path) -> None:
    path = write_json(tmp_path / "s.json", calibration())
    assert [(kind.k, kind.v) for kind in plan_cache(config, cache_scales=path)] == [("f16", "f16"), ("q8_0", "q4_0")]
    first, second = plan_cache(config, ("fp8_e4m3", "fp8_e5m2"), cache_scales=path)
    assert (first.k, first.v, second.k) == ("fp8_e4m3", "fp8_e5m2", "fp8_e4m3")
    assert first.k_scales == (2 / 448, 2.0)  # twice what was seen fits
    assert first.v_scales == (4 / 57344, 2 / 57344)  # all zeros: any scale will do
    tiny = calibration(layers=[LAYER | {"k_max": [1e-7, 1e7]}] * 2)
    plan = plan_cache(config, "fp8_e5m2", cache_scales=write_json(tmp_path / "t.json", tiny))
    scales = np.float16(plan[0].k_scales)
    assert scales[0] > 0
    assert np.isfinite(scales).all()
    assert plan_cache(config, "int8", cache_scales=path)[0].k_scales is None
    assert plan_cache(config, "fp8_e4m3", True, path)[0].k_scales is None  # rotated rows need scales of their own


def test_a_calibration_file_survives(config: ModelConfig, tmp_path: Path) -> None:
    layers = (LayerScales((1.5, 0.0), (3.0, 1e-7)), LayerScales((1.0, 2.0), (3.0, 4.0), ("f16", "iq4_nl")))
    sensitivity = {"q4_0": {"k": [0.1, 0.2], "v": [0.0, 1.0]}}
    write_scales(tmp_path / "s.json", layers, model="model", text="text", n_tokens=7, sensitivity=sensitivity)
    assert read_scales(tmp_path / "s.json", config) == layers
    assert json.loads((tmp_path / "s.json").read_text())["sensitivity"] == sensitivity
    assert [file.name for file in tmp_path.glob("s*")] == ["s.json"]


BAD = {
    "a list": ([], FormatError, "is not a calibration file: `gguf-eval kv-scales"),
    "another format": (calibration(format="x"), FormatError, "is not a calibration file"),
    "version": (calibration(version=2), FormatError, "is of version 2, this program reads 1"),
    "no layers": (calibration(layers=None), GgufRunError, "of a model with no layers, this one has 2"),
    "layers": (calibration(layers=[LAYER] * 3), GgufRunError, "of a model with 3 layers, this one has 2"),
    "no object": (calibration(layers=[3, LAYER]), FormatError, "layer 0 is '3', must be an object"),
    "heads": (
        calibration(layers=[LAYER, LAYER | {"v_max": [1]}]),
        GgufRunError,
        "layer 1 has 1 values of v_max, the mo",
    ),
    "no maxima": (calibration(layers=[LAYER, {}]), GgufRunError, "layer 1 has no values of k_max"),
    "negative": (calibration(layers=[LAYER, LAYER | {"k_max": [-1, 1]}]), FormatError, "k_max must be numbers from 0"),
    "infinite": (calibration(layers=[LAYER, LAYER | {"k_max": [1e999, 1]}]), FormatError, "k_max must be numbers"),
    "text": (calibration(layers=[LAYER, LAYER | {"k_max": ["1", 1]}]), FormatError, "k_max must be numbers"),
    "true": (calibration(layers=[LAYER, LAYER | {"k_max": [True, 1]}]), FormatError, "k_max must be numbers"),
    "400 digits": (calibration(layers=[LAYER, LAYER | {"v_max": [10**400, 1]}]), FormatError, "v_max must be numbers"),
    "infinite as f16": (
        calibration(layers=[LAYER, LAYER | {"v_max": [1e8, 1]}]),
        FormatError,
        r"layer 1: v_max must be numbers from 0 to 1e\+07",
    ),
    "version of 4000 digits": (calibration(version=10**4000), FormatError, "is of version 10{39}, this program"),
    "type": (
        calibration(layers=[LAYER | {"k": "q4_0", "v": "q1"}, LAYER]),
        FormatError,
        "layer 0 has the cache type 'q1'",
    ),
    "half a type": (calibration(layers=[LAYER | {"k": "q4_0"}, LAYER]), FormatError, "layer 0 has the cache type None"),
    "a list as type": (calibration(layers=[LAYER | {"k": [], "v": []}, LAYER]), FormatError, "cache type \\[\\]"),
}


@pytest.mark.parametrize(("facts", "error", "words"), BAD.values(), ids=BAD)
def test_bad_calibration_files(config: ModelConfig, tmp_path: Path, facts: Any, error: type, words: str) -> None:
    path = write_json(tmp_path / "s.json", facts)
    with pytest.raises(error, match=rf"s\.json: .*{words}"):
        read_scales(path, config)


@pytest.mark.parametrize("data", [b"", b"\xff", b"GGUF", b"[" * 100_000, b"1" * 9000])
def test_files_that_are_no_json(config: ModelConfig, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "s.json").write_bytes(data)
    with pytest.raises(FormatError, match="is not a calibration file"):
        read_scales(tmp_path / "s.json", config)
