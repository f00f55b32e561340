"""gguf-info --fit against published sizes, and against the memory plan that loading uses."""

import json
from dataclasses import replace

import pytest
import real
from click.testing import CliRunner

from gguf_run.kernels_cpu.measure.limits import Limits
from gguf_run.runtime.cli.info import main
from gguf_run.runtime.info.fit import DECODE_PART, TYPES, USUAL_MODELS, Machine, fit_row, fit_usual, quantized, speeds
from gguf_run.runtime.load.memory import MemoryPlan

MACHINE = Machine(10_000_000_000, Limits(2, 40e9, 1.8e12))
BY_NAME = {model.name: model for model in USUAL_MODELS}


@pytest.mark.parametrize(
    ("name", "type", "gib"),
    [("8B", "Q8_0", 7.95), ("8B", "Q4_K_M", 4.58), ("8B", "Q2_K", 2.95), ("70B", "Q4_K_M", 39.59)],
)
def test_sizes_as_published(name: str, type: str, gib: float) -> None:
    """llama-bench's "size" of these models, in many of its published tables."""
    row = next(row for row in fit_usual(BY_NAME[name], MACHINE)["rows"] if row["type"] == type)
    assert round(row["nbytes"] / 2**30, 2) == gib


def test_parameters_as_published() -> None:
    n_weights = {name: sum(t.n_elements for t in model.tensors()[1]) for name, model in BY_NAME.items()}
    assert {name: round(n / 1e9, 2) for name, n in n_weights.items()} == {
        "1B": 1.24, "3B": 3.21, "8B": 8.03, "14B": 14.77, "30B-A3B": 30.53, "32B": 32.76, "70B": 70.55,
    }  # fmt: skip


def test_largest_context_fits_and_no_larger_one() -> None:
    config, tensors = BY_NAME["8B"].tensors()
    tensors = quantized(tensors, config, "Q6_K")
    row = fit_row("Q6_K", config, tensors, MACHINE)
    for kind, n_ctx in row["contexts"].items():
        plan = MemoryPlan(config, tensors, n_ctx, ()).with_type(kind)
        assert plan.needed().total <= 10e9 < replace(plan, n_ctx=n_ctx + 256).needed().total
    assert row["contexts"]["q8_0"] > 1.8 * row["contexts"]["f16"] > 0
    assert set(fit_row("", config, tensors, replace(MACHINE, available=6_000_000_000))["contexts"].values()) == {0}
    assert set(fit_row("", config, tensors, replace(MACHINE, available=None))["contexts"].values()) == {131072}


def test_decoding_reads_what_a_token_needs() -> None:
    """All but the embeddings, of which it takes a row; of 128 experts 8: 3.04 of 30.53 billion weights."""
    for name, n_read in (("8B", 7.50e9), ("1B", 1.236e9), ("30B-A3B", 3.04e9)):
        config, tensors = BY_NAME[name].tensors()
        speed, _ = speeds(config, tensors, MACHINE.limits)
        assert DECODE_PART * 40e9 / speed / 2 == pytest.approx(n_read, rel=0.003)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(Machine, "measure", lambda: MACHINE)
    done = CliRunner().invoke(main, ["--fit", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_command(monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(run(monkeypatch, str(real.smollm2()), "--json"))
    rows = found["models"][0]["rows"]
    assert [row["type"] for row in rows] == ["Q4_1", *TYPES]
    assert rows[0]["bits_per_weight"] == pytest.approx(5.74, abs=0.01)
    assert found["machine"]["available_memory"] == MACHINE.available
    lines = run(monkeypatch, str(real.smollm2())).splitlines()
    assert lines[3].split()[:2] == [real.smollm2().name, "Q4_1"]


def test_table_of_usual_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run(monkeypatch).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("no room" in line for line in lines) == 10  # 14B in Q8_0, and all of the larger ones


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "0 MODELs"),
        (["a", "b"], 2, "2 MODELs"),
        (["--fit", "no.gguf"], 1, "no.gguf"),
        (["--fit", "a", "-c", "100"], 2, "--fit goes without --ctx-size"),
        (["--fit", "a", "--set", "a=b", "--in-place"], 2, "--fit goes without --set"),
    ],
)
def test_refuses(arguments: list[str], code: int, message: str) -> None:
    done = CliRunner().invoke(main, arguments)
    assert (done.exit_code, message in done.stderr) == (code, True)
