"""What tests run on which tokens, and what is made of their times; a fake model records what it is told."""

import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cpu_ops import cpu
from tinymodel import TINY_GEMMA3, Tiny, write_tiny

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.kernels_cpu.measure.limits import Limits
from gguf_run.runtime.bench import bench
from gguf_run.runtime.bench.bench import DEFAULTS, BenchedModel, Case, Procedure, Result, ideal_seconds, run_cases
from gguf_run.runtime.load.options import LoadOptions
from gguf_run.runtime.model import Model

LIMITS = Limits(1, read_bytes=1e9, int8_ops=1e10)


class FakeDecoder:
    """Keeps what it is told: ("rewind", n_past) and ("forward", ids, n_outputs)."""

    of_layers: tuple[Any, ...] = ()

    def __init__(self, n_vocab: int) -> None:
        self.config, self.backends = SimpleNamespace(n_vocab=n_vocab), self.of_layers
        self.n_past = 0
        self.log: list[tuple[Any, ...]] = []

    def rewind(self, n_past: int) -> int:
        assert n_past <= self.n_past
        self.n_past = n_past
        self.log.append(("rewind", n_past))
        return n_past

    def forward(self, ids: list[int], n_outputs: int = 1) -> Iterator[None]:
        self.log.append(("forward", ids, n_outputs))
        self.n_past += len(ids)
        yield None

    def nbytes(self) -> dict[str, int]:
        return {"weights": 1000}


class FakeModel:
    loaded: list[tuple[Path, LoadOptions, Any]]
    decoders: list[FakeDecoder]
    add_bos = True

    @classmethod
    def load(cls, path: Path, options: LoadOptions, progress: Any) -> "FakeModel":
        cls.loaded.append((path, options, progress))
        return cls()

    def __init__(self) -> None:
        self.decoder = FakeDecoder(300)
        self.decoders.append(self.decoder)
        self.tokenizer = SimpleNamespace(bos=1, add_bos=self.add_bos)

    def __enter__(self) -> "FakeModel":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeModel]:
    """Models and limits are fake; limits.n_threads tells for how many threads they were measured."""

    class Fake(FakeModel):
        loaded: list[tuple[Path, LoadOptions, Any]] = []  # noqa: RUF012
        decoders: list[FakeDecoder] = []  # noqa: RUF012

    monkeypatch.setattr(bench, "Model", Fake)
    monkeypatch.setattr(bench, "measure_limits", lambda n_threads: Limits(n_threads, 1e9, 1e10))
    return Fake


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_tiny(path)
    return str(path)


class FakeGpu:
    name = "a GPU"

    def limits(self) -> tuple[float, float]:
        return 1e12, 1e15


def test_gpus(fake: type[FakeModel], model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have limits of their own; where layers run on the CPU too, there is no limit to compare with."""
    gpu, case = FakeGpu(), Case(model, 0, 4)
    for backends, both in (((gpu, gpu), False), ((cpu(2), gpu), True)):
        monkeypatch.setattr(FakeDecoder, "of_layers", backends)
        (result,) = run_cases([case], Procedure(repetitions=1))
        assert (result.gpus, result.limits) == (("a GPU",), Limits(0, 1e12, 1e15, "a GPU"))
        assert (result.fraction is None) == both
        if not both:  # Tiny's F32 weights, the embeddings are the output too
            seconds = ideal_seconds(case, result.model, 4 * (279 * 96 + 2 * 96 * 864 + 5 * 96), result.limits)
            assert result.fraction == pytest.approx(seconds * result.avg_ts / 4, rel=1e-3)


def steps(decoder: FakeDecoder) -> list[tuple[int, int, int]]:
    """(position, tokens, outputs) of each forward, the rewinds before it applied."""
    found, n_past = [], 0
    for kind, *rest in decoder.log:
        if kind == "rewind":
            n_past = rest[0]
        else:
            found.append((n_past, len(rest[0]), rest[1]))
            n_past += len(rest[0])
    return found


def test_prompt_then_tokens_one_by_one(fake: type[FakeModel], model: str) -> None:
    """Warm-up: the whole prompt, but one token only. A prompt comes in logical batches, each with logits at its end."""
    case = Case(model, n_prompt=20, n_gen=3, n_batch=8, n_ubatch=4)
    (result,) = run_cases([case], Procedure(repetitions=2))
    prompt = [(0, 8, 1), (8, 8, 1), (16, 4, 1)]
    run = [*prompt, (20, 1, 1), (21, 1, 1), (22, 1, 1)]
    assert steps(fake.decoders[0]) == [*prompt, (20, 1, 1), *run, *run]
    assert len(result.samples_ns) == 2
    ((path, options, _),) = fake.loaded
    assert (path, options) == (Path(model), replace(DEFAULTS, n_ctx=23, n_batch=4))


def test_no_warmup(fake: type[FakeModel], model: str) -> None:
    list(run_cases([Case(model, 0, 2)], Procedure(repetitions=1, warmup=False)))
    assert steps(fake.decoders[0]) == [(0, 1, 1), (1, 1, 1)]


def test_the_context_is_filled_once_for_a_depth(fake: type[FakeModel], model: str) -> None:
    cases = [Case(model, 4, 0, 10), Case(model, 0, 2, 10), Case(model, 4, 0, 6), Case(model, 4, 0, 0)]
    list(run_cases(cases, Procedure(repetitions=1, warmup=False)))
    assert steps(fake.decoders[0]) == [
        (0, 10, 0),
        (10, 4, 1),
        (10, 1, 1),
        (11, 1, 1),
        (0, 6, 0),
        (6, 4, 1),
        (0, 0, 0),
        (0, 4, 1),
    ]
    assert fake.loaded[0][1].n_ctx == 14


def test_tokens_are_random_and_start_with_bos(fake: type[FakeModel], model: str) -> None:
    def prompts() -> list[list[int]]:
        list(run_cases([Case(model, 50, 0)], Procedure(repetitions=2)))
        return [entry[1] for entry in fake.decoders[-1].log if entry[0] == "forward"]

    found = prompts()
    assert [ids[0] for ids in found] == [1, 1, 1]
    assert len({tuple(ids) for ids in found}) == 3
    assert all(0 <= id < 300 for ids in found for id in ids)
    assert prompts() == found  # the same in every run of the program
    fake.add_bos = False
    assert [ids[1:] for ids in prompts()] == [ids[1:] for ids in found]
    assert prompts()[0][0] != 1


def test_neighbours_share_a_loaded_model(fake: type[FakeModel], model: str) -> None:
    """What a loaded model depends on: threads, cache type, device, tokens at once. Not the logical batch."""
    same = [
        Case(model, 8, 0),
        Case(model, 0, 9),
        Case(model, 8, 0, n_batch=600),
        Case(model, 8, 0, n_ubatch=512, n_depth=3),
    ]
    changes: list[dict[str, Any]] = [{"n_threads": 2}, {"n_threads": 2, "cache_type": ("f32", "f16")}]
    others = [Case(model, 8, 0, options=replace(DEFAULTS, **change)) for change in changes]
    others += [Case(model, 8, 0, n_batch=64)]
    others += [Case(model, 8, 0, n_batch=64, options=replace(DEFAULTS, device="cpu"))]
    changes = [{"gpu_layers": "all"}, {"n_cpu_moe": 1}]
    others += [Case(model, 8, 0, options=replace(DEFAULTS, **change)) for change in changes]
    results = list(run_cases([*same, *others], Procedure(repetitions=1)))
    assert [result.case for result in results] == [*same, *others]
    assert [options.n_ctx for _, options, _ in fake.loaded] == [11, *[8] * 6]
    assert [options.n_batch for _, options, _ in fake.loaded] == [512, 512, 512, 64, 64, 512, 512]
    assert [result.limits.n_threads for result in results] == [1, 1, 1, 1, 2, 2, 1, 1, 1, 1]


def test_limits_are_measured_once_for_each_number_of_threads(
    fake: type[FakeModel], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(bench, "measure_limits", lambda n: asked.append(n) or LIMITS)  # type: ignore[func-returns-value]
    options = [LoadOptions(n_threads=n, cache_type=(t, t)) for n in (1, 2) for t in ("f16", "f32", "f16")]
    cases = [Case(model, 4, 0, options=each) for each in options]
    list(run_cases(cases, Procedure(repetitions=1)))
    assert asked == [1, 2]


def test_a_missing_file_stops_before_anything_runs(fake: type[FakeModel], model: str, tmp_path: Path) -> None:
    with pytest.raises(GgufRunError, match=r"gone\.gguf"):
        run_cases([Case(model, 4, 0), Case(str(tmp_path / "gone.gguf"), 4, 0)], Procedure())
    assert not fake.loaded


def test_delay_and_notes(fake: type[FakeModel], model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    notes: list[str] = []
    monkeypatch.setattr(bench.time, "sleep", slept.append)
    list(run_cases([Case(model, 4, 0), Case(model, 0, 4, 2)], Procedure(2, True, 1.5, notes.append)))
    assert slept == [1.5, 1.5]
    assert notes[0] == "measuring the limits of this machine, threads: 1"
    assert notes[1:] == [
        *("pp4: warming up", "pp4: run 1 of 2", "pp4: run 2 of 2"),
        *("tg4 @ d2: filling the context", "tg4 @ d2: warming up", "tg4 @ d2: run 1 of 2", "tg4 @ d2: run 2 of 2"),
    ]
    fake.loaded[0][2](1, 4)
    assert notes[-1] == "loading tiny.gguf: 25%"


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (Case("m", 512, 0), "pp512"),
        (Case("m", 0, 128), "tg128"),
        (Case("m", 512, 128), "pp512+tg128"),
        (Case("m", 512, 0, 4096), "pp512 @ d4096"),
    ],
)
def test_names(case: Case, name: str) -> None:
    assert str(case) == name


def model_of(path: Path) -> BenchedModel:
    with GGUFFile.open(path) as file:
        return BenchedModel.of(file)


def test_statistics(model: str) -> None:
    """Speeds are averaged, not times; the deviation is that of a sample."""
    case, samples = Case("m", 30, 10), (1_000_000_000, 2_000_000_000, 4_000_000_000)
    result = Result(case, model_of(Path(model)), LIMITS, 0.5, "", samples)
    assert result.samples_ts == [40, 20, 10]
    assert result.avg_ts == pytest.approx(70 / 3)
    assert result.stddev_ts == pytest.approx(statistics.stdev([40, 20, 10])) == pytest.approx(15.2752523)
    single = Result(case, result.model, LIMITS, 0.5, "", samples[:1])
    assert single.stddev_ts == 0


def test_facts(tmp_path: Path) -> None:
    tiny = Tiny(n_layer=3, n_embd=64, n_head=4, n_head_kv=2, head_dim=16, n_ff=96, type="Q8_0", biases=("attn_output",))
    weights = write_tiny(tmp_path / "m.gguf", tiny)
    facts = model_of(tmp_path / "m.gguf")
    assert facts.n_params == sum(values.size for values in weights.values())
    assert facts.layer_weights == 3 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96)
    n_vocab = len(weights["token_embd.weight"])
    assert facts.output_weights == 64 * n_vocab
    matrices = facts.layer_weights + facts.output_weights
    assert facts.model_size == matrices * 34 // 32 + 4 * (facts.n_params - matrices)
    untied = write_tiny(tmp_path / "u.gguf", Tiny(tied=False))
    assert model_of(tmp_path / "u.gguf").output_weights == untied["output.weight"].size


def test_decoding_is_bounded_by_bytes(tmp_path: Path) -> None:
    """Each token reads all weights and the keys and values up to its own, in layers with a window those inside it."""
    write_tiny(tmp_path / "m.gguf", TINY_GEMMA3)  # 6 layers, 5 of them with a window of 7; one KV head of 32
    facts = model_of(tmp_path / "m.gguf")
    n_bytes = 0
    for position in (5, 6, 7, 8):
        n_bytes += 100_000_000
        for il in range(6):
            before = position if il == 5 else min(position, 6)
            n_bytes += (before + 1) * 2 * 32 * 2
    case = Case("m", 0, 4, n_depth=5)
    assert ideal_seconds(case, facts, 100_000_000, LIMITS) == pytest.approx(n_bytes / 1e9, rel=1e-12)
    f32 = replace(case, options=replace(DEFAULTS, cache_type=("f32", "f32")))
    wide = ideal_seconds(f32, facts, 100_000_000, LIMITS)
    assert wide == pytest.approx((2 * n_bytes - 4 * 100_000_000) / 1e9, rel=1e-12)


def test_a_prompt_is_bounded_by_operations(model: str) -> None:
    """2 per weight and token; the output matrix counts only at the end of a logical batch."""
    facts = model_of(Path(model))
    slow = Limits(1, read_bytes=1e15, int8_ops=1e6)
    for n_batch, n_outputs in ((100, 1), (50, 2), (40, 3)):
        case = Case("m", 100, 0, n_batch=n_batch, n_ubatch=16)
        expected = 2 * (100 * facts.layer_weights + n_outputs * facts.output_weights) / 1e6
        assert ideal_seconds(case, facts, 1000, slow) == pytest.approx(expected, rel=1e-9)


def test_a_short_prompt_is_bounded_by_bytes(model: str) -> None:
    """Tokens that run at once read the weights once; the slower of both limits counts for each such step."""
    facts = model_of(Path(model))
    n_kv = 2 * 2 * 64 * 2  # bytes per position: two layers of keys and values, 64 wide, f16
    limits = Limits(1, read_bytes=1e9, int8_ops=1e15)
    seconds = ideal_seconds(Case("m", 12, 0, n_ubatch=8), facts, 1_000_000, limits)
    assert seconds == pytest.approx((2 * 1_000_000 + (8 + 12) * n_kv) / 1e9, rel=1e-9)


def test_fraction_is_the_ideal_time_over_the_measured_one(fake: type[FakeModel], model: str) -> None:
    (result,) = run_cases([Case(model, 6, 2)], Procedure(repetitions=3))
    ideal = ideal_seconds(result.case, result.model, 1000, result.limits)
    assert result.fraction == pytest.approx(ideal * result.avg_ts / 8)


def test_a_real_decoder_tells_the_bytes_it_reads(model: str) -> None:
    """Panels of float32 hold 16 rows each."""
    facts = model_of(Path(model))
    with Model.load(model, n_ctx=32, n_threads=1) as loaded:
        held = loaded.decoder.nbytes()
    assert 4 * (facts.layer_weights + facts.output_weights) <= held["weights"]
    assert held["weights"] < 4 * (facts.layer_weights + facts.output_weights + 16 * 160 * 8)
    assert held["cache"] == 2 * 2 * 64 * 64 * 2  # a page
