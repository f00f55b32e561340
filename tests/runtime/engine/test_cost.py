"""The cost model against machines that are known."""

import random

import pytest

from gguf_run.runtime.engine.cost import CostModel


def ms(factors: tuple[float, ...], n_answers: int, n_prompt: int, n_read: float) -> float:
    a, b, c, d = factors
    return a + b * n_answers + c * n_prompt + d * n_read / 1000


@pytest.mark.parametrize("factors", [(20, 2, 3, 0.3), (3, 0.3, 0.28, 0.02), (150, 15, 20, 1), (0.2, 0.01, 0.01, 0)])
@pytest.mark.parametrize("noise", [0, 0.2])
def test_it_learns_a_machine(factors: tuple[float, ...], noise: float) -> None:
    rng, model = random.Random(1), CostModel()
    assert model.chunk(100, 0) == 24  # before anything is known
    for i in range(400):
        n_answers = rng.randint(1, 16)
        n_prompt = model.chunk(100, 1000) if i % 3 == 0 else 0
        n_read = n_answers * rng.randint(10, 2000) + n_prompt * 1000
        model.measure(
            n_answers, n_prompt, n_read, ms(factors, n_answers, n_prompt, n_read) * rng.uniform(1 - noise, 1 + noise)
        )
    for n_answers, n_past in ((1, 0), (8, 4000)):
        left = 100 - model.predict(n_answers, 0, n_answers * 1000)
        n = model.chunk(left, n_past)
        took = ms(factors, n_answers, n, n_answers * 1000 + n * (n_past + n / 2))
        assert took < 125 or n <= 16
        assert took > 60 or n > 1000 or factors[0] > 100


def test_steps_that_are_alike_make_it_forget_nothing() -> None:
    model = CostModel()
    for n in (24, 36, 50, 20, 30):
        model.measure(2, n, 100 * n, ms((20, 2, 3, 0), 2, n, 100 * n))
    before = model.chunk(75, 0)
    for _ in range(5000):
        model.measure(2, 0, 1000, 24)
    assert model.chunk(75, 0) == pytest.approx(before, abs=5)


def test_it_follows_a_machine_that_slows_down() -> None:
    model = CostModel()
    for factor in (1, 3):
        for i in range(300):
            model.measure(4, i % 40, 100, factor * ms((20, 2, 3, 0), 4, i % 40, 100))
        assert model.predict(4, 20, 100) == pytest.approx(factor * 88, rel=0.05)


def test_parts_are_smaller_while_the_machine_is_slow() -> None:
    """Another program takes half of the machine for some steps: three steps later they are within the time again."""
    model, took = CostModel(), []
    for i in range(100):
        factor = 2 if 60 <= i < 80 else 1
        n = model.chunk(100 - model.predict(3, 0, 3000), 1000)
        took.append(factor * ms((20, 2, 3, 0.2), 3, n, 3000 + n * (1000 + n / 2)))
        model.measure(3, n, 3000 + n * (1000 + n / 2), took[-1])
    assert max(took[20:60]) < 110
    assert 170 < took[60] < 210
    assert max(took[63:80]) < 115
    assert min(took[90:]) > 85
    assert max(took[90:]) < 110


def test_parts_grow_step_by_step() -> None:
    """A fit from few steps is not trusted far beyond them."""
    model, sizes = CostModel(), []
    for _ in range(6):
        n = model.chunk(95, 0)
        sizes.append(n)
        model.measure(1, n, n, 1 + 0.01 * n)
    assert sizes == [24, 36, 54, 81, 121, 181]
    assert model.chunk(0, 0) == model.chunk(-5, 0) == 0


def test_steps_of_microseconds_break_nothing() -> None:
    """Equal steps that take nearly no time make the equations singular; slower ones are learned behind them."""
    model = CostModel()
    for i in range(3000):
        model.measure(1, 0, 8, 1e-3 * (1 + i % 3))
    for _ in range(300):
        model.measure(1, 0, 8, 20)
    assert model.predict(1, 0, 8) == pytest.approx(20, rel=0.1)
