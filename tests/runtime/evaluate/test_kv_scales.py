"""Calibration of the KV cache: maxima against NumPy, what a budget buys, the command from outside."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy_backend import NumpyBackend
from tinymodel import write_tiny

from gguf_run.formats.errors import OptionError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder
from gguf_run.runtime.cli.evaluate import main
from gguf_run.runtime.evaluate.kv_scales import KINDS, best_types, bits_of, calibrate, check_budget, trials
from gguf_run.runtime.evaluate.text import Scorer, cut_chunks, tokens_of
from gguf_run.runtime.model import Model

TEXT = "the order and another one, or the other end of the road and so on, and then there were none. " * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scales")
    write_tiny(folder / "m.gguf")
    (folder / "t.txt").write_text(TEXT)
    return folder


@pytest.fixture
def config(folder: Path) -> ModelConfig:
    with GGUFFile.open(folder / "m.gguf") as file:
        return ModelConfig.from_metadata(file.metadata, file.tensors)


def test_bits() -> None:
    found = {name: bits_of(name, 64) for name in ("f16", "q8_0", "q5_1", "q4_0", "int8")}
    assert found == {"f16": 16, "q8_0": 8.5, "q5_1": 6, "q4_0": 4.5, "int8": 8.25}


def test_each_trial_changes_one_place(config: ModelConfig) -> None:
    found = trials(config, ["q4_0", "q8_0"])
    assert [(name, kind) for name, kind, _ in found] == [
        (name, kind) for name in ("q4_0", "q8_0") for kind in "kv" for _ in range(2)
    ]
    assert [[(layer.k, layer.v) for layer in plan] for _, _, plan in found[:4]] == [
        [("q4_0", "f32"), ("f32", "f32")],
        [("f32", "f32"), ("q4_0", "f32")],
        [("f32", "q4_0"), ("f32", "f32")],
        [("f32", "f32"), ("f32", "q4_0")],
    ]


COSTS = {
    "q4_0": {"k": [8.0, 1.0], "v": [2.0, 0.5]},
    "q8_0": {"k": [1.0, 0.5], "v": [0.0, 0.5]},
    "f16": {"k": [0.0, 0.0], "v": [0.0, 0.0]},
}


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (4.5, [("q4_0", "q4_0"), ("q4_0", "q4_0")]),
        (5.49, [("q4_0", "q4_0"), ("q4_0", "q4_0")]),
        (5.5, [("q8_0", "q4_0"), ("q4_0", "q4_0")]),
        (6.5, [("q8_0", "q8_0"), ("q4_0", "q4_0")]),
        (8.375, [("f16", "q8_0"), ("q4_0", "q4_0")]),  # 1 for 7.5 bits, before 0.5 for 4
        (16.0, [("f16", "q8_0"), ("f16", "f16")]),
    ],
)
def test_a_budget_buys_the_best_first(config: ModelConfig, budget: float, expected: list[tuple[str, str]]) -> None:
    assert best_types(COSTS, config, budget) == expected


def test_a_budget_that_is_too_small(config: ModelConfig) -> None:
    with pytest.raises(OptionError, match=r"--bits 4: the smallest of --types, q4_0, takes 4\.5 bits a number"):
        check_budget([*COSTS], config.head_dim, 4.0)


def test_maxima_are_those_of_numpy(folder: Path, config: ModelConfig) -> None:
    """The largest |K| and |V| of each layer and head over two chunks, of which the second is not the larger one."""
    with Model.load(folder / "m.gguf", n_ctx=40, n_threads=2, cache_type="f32") as model, Scorer(model, 1) as scorer:
        chunks = cut_chunks(tokens_of(model, TEXT), 40, None, 2)
        *_, seen = calibrate(scorer, chunks, n_kept=1)
    k, v = (np.zeros((config.n_layer, config.n_head_kv)) for _ in KINDS)
    with GGUFFile.open(folder / "m.gguf") as file:
        for chunk in chunks:
            decoder = Decoder(config, file.tensors, [NumpyBackend(np.float64)] * config.n_layer, 40)
            logits = np.concatenate([block.copy() for block in decoder.forward(chunk.ids, len(chunk.targets))])
            for largest, name in ((k, "k"), (v, "v")):
                rows = np.stack(
                    [getattr(layer.cache, name)[layer.cache.slots(0, len(chunk.ids))] for layer in decoder.cache.layers]
                )
                np.maximum(largest, np.abs(rows).max(axis=(1, 3)), out=largest)
            if chunk is chunks[0]:
                np.testing.assert_allclose(seen.logits[0], logits, atol=1e-4)
    assert len(seen.logits) == 1
    assert (seen.n_chunk, seen.n_tokens) == (2, 78)
    np.testing.assert_allclose([layer.k_max for layer in seen.layers()], k, rtol=1e-5)
    np.testing.assert_allclose([layer.v_max for layer in seen.layers()], v, rtol=1e-5)


def command(folder: Path, target: Path) -> list[str]:
    files = [str(path) for path in (folder / "m.gguf", "-f", folder / "t.txt", "-o", target / "s.json")]
    return ["kv-scales", *files, "-c", "40", "-t", "2"]


def test_the_command(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [*command(folder, tmp_path), "--chunks", "2"])
    assert result.exit_code == 0, result.stderr
    scales = json.loads((tmp_path / "s.json").read_text())
    head, *lines = result.stdout.splitlines()
    assert head.split() == ["layer", "max", "|K|", "max", "|V|"]
    for i, (line, layer) in enumerate(zip(lines, scales["layers"], strict=True)):
        assert line.split() == [str(i), f"{max(layer['k_max']):.4g}", f"{max(layer['v_max']):.4g}"]


def test_the_command_with_types(folder: Path, tmp_path: Path) -> None:
    """The table's columns, the file that Model.load takes, and types that follow from the sensitivities."""
    result = CliRunner().invoke(
        main, [*command(folder, tmp_path), "--chunks", "1", "--types", "f16,f32", "--bits", "20"]
    )
    assert result.exit_code == 0, result.stderr
    scales = json.loads((tmp_path / "s.json").read_text())
    costs = scales["sensitivity"]
    assert costs["f32"] == {"k": [0, 0], "v": [0, 0]}
    assert all(0 < cost < 1e-6 for kind in KINDS for cost in costs["f16"][kind])
    worst = max((costs["f16"][kind][il], kind, il) for kind in KINDS for il in (0, 1))
    types = {(kind, il): layer[kind] for il, layer in enumerate(scales["layers"]) for kind in KINDS}
    assert types == dict.fromkeys(types, "f16") | {worst[1:]: "f32"}
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[1][3:] == [*(f"{costs[t][kind][0]:.2g}" for t in ("f16", "f32") for kind in KINDS), lines[1][-1]]
    assert lines[1][-1] == f"{types['k', 0]}/{types['v', 0]}"
    with Model.load(folder / "m.gguf", n_ctx=8, n_threads=1, cache_scales=tmp_path / "s.json") as model:
        assert model.decoder.nbytes()["cache"] == 64 * 2 * 32 * (3 * 2 + 4) // 2 * 2  # a page


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits", "5"], "--bits chooses among --types"),
        (["--types", "q4_0,q9"], "--types is 'q9'; allowed: f32, "),
        (["--types", "q4_0", "--bits", "4"], "--bits 4: the smallest of --types, q4_0, takes 4.5"),
        (["--chunks", "0"], "'--chunks'"),
    ],
)
def test_bad_options(folder: Path, tmp_path: Path, options: list[str], words: str) -> None:
    result = CliRunner().invoke(main, [*command(folder, tmp_path), *options])
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert not any(tmp_path.iterdir())
