"""Comparison of two models: the figures by their definitions, and whole models against each other."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tinymodel import Tiny, write_tiny

from gguf_run.formats.errors import GgufRunError
from gguf_run.kernels_cpu.measure.log_softmax import LogSoftmax
from gguf_run.runtime import Model
from gguf_run.runtime.evaluate.kl import TOKEN_SCORES, Comparison, compare, kl_ratio
from gguf_run.runtime.evaluate.logits_file import round_logits, unround_logits
from gguf_run.runtime.evaluate.text import Block, Chunk, Scorer, bos_of, cut_chunks, tokens_of

TEXT = "the order and another one, or the other end of the road and so on, and then there were none. " * 3


def compared(p: list[NDArray[np.float64]], q: list[NDArray[np.float64]], right: list[NDArray[np.int64]]) -> Comparison:
    """A comparison of known distributions: chunks of probabilities [n, n_vocab] and the right tokens."""
    chunks = []
    for a, b, targets in zip(p, q, right, strict=True):
        at = np.arange(len(a)), targets
        same_top = a.argmax(1) == b.argmax(1)
        chunks.append(
            scores(kl=(a * np.log(a / b)).sum(1), nll=-np.log(b[at]), nll_base=-np.log(a[at]), same_top=same_top)
        )
    return Comparison(tuple(chunks))


def scores(**fields: NDArray[Any]) -> NDArray[np.void]:
    """Scores of the tokens of one chunk; fields that are not given are 0."""
    made = np.zeros(len(next(iter(fields.values()))), TOKEN_SCORES)
    for name, values in fields.items():
        made[name] = values
    return made


def test_figures_by_llama_cpp_definitions() -> None:
    """With sums of squares and covariances, as its perplexity tool has them."""
    rng = np.random.default_rng(0)
    p = [rng.dirichlet(np.ones(9), n) for n in (40, 33)]
    q = [0.8 * a + 0.2 * rng.dirichlet(np.ones(9), len(a)) for a in p]
    right = [rng.integers(0, 9, len(a)) for a in p]
    done = compared(p, q, right)
    assert (done.n_chunk, len(done.scores("kl"))) == (2, 73)

    n = 73
    nll, base, kl = (done.scores(name) for name in ("nll", "nll_base", "kl"))

    def mean_and_error(x: NDArray[np.float64]) -> tuple[float, float]:
        return x.mean(), math.sqrt(((x * x).mean() - x.mean() ** 2) / (n - 1))

    (log_q, error_q), (log_p, error_p) = mean_and_error(nll), mean_and_error(base)
    covariance = ((nll * base).mean() - log_q * log_p) / (n - 1)
    log_ratio_error = math.sqrt(error_q**2 + error_p**2 - 2 * covariance)
    ratio = math.exp(log_q - log_p)
    change = np.exp(-nll) - np.exp(-base)
    square, square_error = mean_and_error(change**2)
    same = sum((a.argmax(1) == b.argmax(1)).sum() for a, b in zip(p, q, strict=True)) / n
    expected = {
        "perplexity": (math.exp(log_q), math.exp(log_q) * error_q),
        "perplexity_base": (math.exp(log_p), math.exp(log_p) * error_p),
        "perplexity_ratio": (ratio, ratio * log_ratio_error),
        "kl_mean": mean_and_error(kl),
        "p_change_mean": mean_and_error(change),
        "p_change_rms": (math.sqrt(square), 0.5 / math.sqrt(square) * square_error),
        "same_top": (same, math.sqrt(same * (1 - same) / (n - 1))),
    }
    found = done.estimates()
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert (found[name].value, found[name].error) == pytest.approx(values, rel=1e-9), name
    assert 0 < same < 1


def test_percentiles_are_interpolated() -> None:
    done = Comparison((scores(kl=np.arange(0, 1001.0, 2)), scores(kl=np.arange(1, 1001.0, 2))))
    expected = {50: 500, 90: 900, 95: 950, 99: 990, 99.9: 999, 100: 1000}
    assert done.kl_percentiles() == pytest.approx(expected)
    done = Comparison((scores(kl=np.array([1.0, 2.0])),))
    assert done.kl_percentiles()[90.0] == pytest.approx(1.9)


def test_errors_by_chunk() -> None:
    """Tokens of a chunk that are all alike are worth one token."""
    values = np.array([0.1, 0.3, 0.2])
    done = Comparison(tuple(scores(kl=np.full(50, v), nll=np.full(50, 1 + v), nll_base=np.ones(50)) for v in values))
    error = values.std(ddof=1) / math.sqrt(3)
    found = done.by_chunk().estimates()
    assert (found["kl_mean"].value, found["kl_mean"].error) == pytest.approx((0.2, error))
    ratio = math.exp(0.2)
    assert (found["perplexity_ratio"].value, found["perplexity_ratio"].error) == pytest.approx((ratio, ratio * error))
    assert (found["same_top"].value, found["same_top"].error) == (0, 0)
    assert done.estimates()["kl_mean"].value == pytest.approx(0.2)
    assert done.estimates()["kl_mean"].error < error / 5


def test_ratio_is_of_pairs() -> None:
    """Its error is that of many draws of the same kind, and far below what two errors of their own would give."""
    rng = np.random.default_rng(3)

    def draw() -> tuple[Comparison, Comparison]:
        hard = rng.gamma(4, 0.1, 40)  # of each chunk
        noise = rng.normal(1, 0.05, (2, 40))
        return tuple(  # type: ignore[return-value]
            Comparison(tuple(scores(kl=np.full(3, kl)) for kl in part * hard * n))
            for part, n in zip((0.6, 1.0), noise, strict=True)
        )

    ratios = [kl_ratio(*draw()) for _ in range(200)]
    spread = np.std([ratio.value for ratio in ratios])
    assert np.mean([ratio.value for ratio in ratios]) == pytest.approx(0.6, abs=0.005)
    assert np.mean([ratio.error for ratio in ratios]) == pytest.approx(spread, rel=0.2)
    a, b = draw()
    alone = a.by_chunk().estimates()["kl_mean"].error / b.estimates()["kl_mean"].value
    assert kl_ratio(a, b).error < 0.3 * alone
    assert (kl_ratio(a, a).value, kl_ratio(a, a).error) == (1, 0)
    assert math.isnan(kl_ratio(a, Comparison((scores(kl=np.zeros(3)),) * 40)).value)


def test_a_single_value_has_no_error() -> None:
    done = compared([np.array([[0.5, 0.5]])], [np.array([[0.4, 0.6]])], [np.array([0])])
    assert done.estimates()["kl_mean"].value == pytest.approx(0.5 * math.log(0.5 / 0.4 * 0.5 / 0.6))
    assert math.isnan(done.estimates()["kl_mean"].error)


def test_an_interrupted_chunk_does_not_count(reduce: LogSoftmax) -> None:
    """Ctrl-C after the first block of the second chunk."""
    model, other = (
        Fixed(np.log(np.array(p, np.float32)), [0, 0], 1, reduce) for p in ([[0.4, 0.6]] * 2, [[0.5, 0.5]] * 2)
    )

    def base(i: int) -> Iterator[Block]:
        for block in other.run([], [0, 0]):
            yield block
            if i == 1:
                raise KeyboardInterrupt

    done = []
    with pytest.raises(KeyboardInterrupt):
        done.extend(compare(model, base, [Chunk([], [0, 0])] * 2))  # type: ignore[arg-type]
    (whole,) = done
    assert (whole.n_chunk, len(whole.scores("kl"))) == (1, 2)
    assert whole.estimates()["perplexity_ratio"].value == pytest.approx(0.5 / 0.4)


# Two models.


class Fixed:
    """In place of a Scorer: gives out these logits, in blocks of `size`."""

    def __init__(self, logits: NDArray[np.float32], right: list[int], size: int, reduce: LogSoftmax) -> None:
        self.logits, self.right, self.size, self.reduce = logits, right, size, reduce

    def run(self, ids: list[int], targets: list[int]) -> Iterator[Block]:
        for start in range(0, len(self.right), self.size):
            rows = self.logits[start : start + self.size].copy()
            right = self.right[start : start + self.size]
            yield Block(rows, self.reduce.log_sum_exp(rows) - rows[np.arange(len(rows)), right])
            rows[:] = np.nan  # a block is gone once the next is asked for


@pytest.fixture
def reduce() -> Iterator[LogSoftmax]:
    kernels = LogSoftmax(2)
    yield kernels
    kernels.close()


@pytest.mark.parametrize("sizes", [(4, 4), (3, 5), (5, 3), (1, 12), (12, 5)])
def test_blocks_of_different_sizes(reduce: LogSoftmax, sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    p, q = rng.standard_normal((2, 12, 70)).astype(np.float32)
    q[:6] = p[:6] + 0.01 * q[:6]
    right = rng.integers(0, 70, 12).tolist()
    ours, theirs = (Fixed(x, right, size, reduce) for x, size in zip((q, p), sizes, strict=True))
    (done,) = compare(ours, lambda i: theirs.run([], right), [Chunk([], right)])  # type: ignore[arg-type]
    a, b = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(1, keepdims=True) for x in (p, q))
    expected = compared([a], [b], [np.array(right)])
    for name in ("kl", "nll", "nll_base", "same_top"):
        assert done.scores(name) == pytest.approx(expected.scores(name), rel=1e-4, abs=1e-7)
    assert 6 <= done.scores("same_top").sum() < 12


def test_rounded_base_is_compared_with_rounded_logits(reduce: LogSoftmax) -> None:
    rng = np.random.default_rng(2)
    logits = (5 * rng.standard_normal((6, 70))).astype(np.float32)
    right = [0, 1, 2, 3, 4, 5]
    scorer = Fixed(logits, right, 6, reduce)

    def saved(i: int) -> Iterator[Block]:
        for block in scorer.run([], right):
            yield Block(unround_logits(*round_logits(block.logits)), block.nll, block.top)

    (exact,) = compare(scorer, saved, [Chunk([], right)], rounded=True)  # type: ignore[arg-type]
    found = [exact.estimates()[name].value for name in ("kl_mean", "perplexity_ratio", "same_top")]
    assert found == [0, 1, 1]
    (rough,) = compare(scorer, saved, [Chunk([], right)])  # type: ignore[arg-type]
    assert 0 < rough.estimates()["kl_mean"].value < 1e-8


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("tiny")

    def make(type_name: str) -> Path:
        path = folder / f"{type_name}.gguf"
        if not path.exists():
            write_tiny(path, Tiny(type=type_name))
        return path

    return make


def comparison(path: Path, base: Path, **base_options: str) -> Comparison:
    with (
        Model.load(path, n_ctx=64, n_threads=2) as model,
        Model.load(base, n_ctx=64, n_threads=2, **base_options) as other,
        Scorer(model, 2) as scorer,
        Scorer(other, 2) as theirs,
    ):
        chunks = cut_chunks(tokens_of(model, TEXT), 64, bos_of(model))
        *_, last = compare(scorer, lambda i: theirs.run(chunks[i].ids, chunks[i].targets), chunks)
    return last


@pytest.mark.parametrize("type_name", ["F32", "Q8_0", "Q4_0"])
def test_a_model_against_itself(tiny: Callable[[str], Path], type_name: str) -> None:
    done = comparison(tiny(type_name), tiny(type_name))
    assert done.n_chunk > 1
    assert (done.scores("kl") == 0).all()
    found = [done.estimates()[name].value for name in ("same_top", "perplexity_ratio", "p_change_rms")]
    assert found == [1, 1, 0]


def test_cache_types(tiny: Callable[[str], Path]) -> None:
    """f16 keys and values cost next to nothing, but not nothing. (With quantized weights activations are rounded to 8
    bits, which turns the smallest difference into a rounding step here and there.)"""
    done = comparison(tiny("F32"), tiny("F32"), cache_type="f32")
    assert 0 < done.estimates()["kl_mean"].value < 1e-5
    assert done.estimates()["same_top"].value == 1


def test_quantization_costs_more_with_fewer_bits(tiny: Callable[[str], Path]) -> None:
    kl = [
        comparison(tiny(type_name), tiny("F32")).estimates()["kl_mean"].value for type_name in ("F16", "Q8_0", "Q4_0")
    ]
    assert 0 < kl[0] < 1e-5 < kl[1] < kl[2]


def test_broken_logits_are_an_error(reduce: LogSoftmax) -> None:
    logits = np.zeros((2, 70), np.float32)
    good, bad = Fixed(logits, [0, 1], 2, reduce), Fixed(logits + np.float32(np.nan), [0, 1], 2, reduce)
    with pytest.raises(GgufRunError, match="chunk 1: the model's logits are not finite"):
        list(compare(good, lambda i: bad.run([], []), [Chunk([], [0, 1])]))  # type: ignore[arg-type]
