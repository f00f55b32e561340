"""Rotary frequencies against values of transformers, and the rotation of the NumPy backend against its definition."""

import math

import numpy as np
import pytest
from numpy_backend import rotate

from gguf_run.models.operands import RopeScaling
from gguf_run.models.rope import make_rope

# transformers 5.23, ROPE_INIT_FUNCTIONS["yarn"] in float32: n_rot, base, scaling, attention factor, inv_freq
YARN = [
    (32, 1e4, RopeScaling("yarn", 8.0, 32), 1.2079441541679836,
     [1.0, 0.398325086, 0.131761566, 0.0222284924, 0.0125, 0.0070292661, 0.00395284733, 0.00222284929, 0.00125,
      0.000702926656, 0.000395284733, 0.000222284929, 0.000125, 7.02926627e-05, 3.95284733e-05, 2.22284925e-05]),
    (24, 1e6, RopeScaling("yarn", 4.0, 32768), 1.138629436111989,
     [1.0, 0.316227764, 0.099999994, 0.0316227786, 0.00999999885, 0.00256935111, 0.000625, 0.000138349686,
      2.49999921e-05, 7.90569356e-06, 2.50000085e-06, 7.90569231e-07]),
    (24, 1e6, RopeScaling("yarn", 4.0, 32768, beta_fast=16.0, beta_slow=2.0), 1.138629436111989,
     [1.0, 0.316227764, 0.099999994, 0.0316227786, 0.00999999885, 0.0031622781, 0.000625, 7.90569611e-05,
      2.49999921e-05, 7.90569356e-06, 2.50000085e-06, 7.90569231e-07]),
]  # fmt: skip


@pytest.mark.parametrize(("n_rot", "base", "scaling", "scale", "inv_freq"), YARN)
def test_yarn(n_rot: int, base: float, scaling: RopeScaling, scale: float, inv_freq: list[float]) -> None:
    rope = make_rope("neox", n_rot, base, scaling)
    assert rope.inv_freq == pytest.approx(inv_freq, rel=2e-6)
    assert rope.scale == pytest.approx(scale, rel=1e-12)


def test_yarn_attention() -> None:
    """llama.cpp's keys: attn_factor multiplies, yarn_attn_factor is the whole, yarn_log_multiplier divides."""
    usual = 1 + 0.1 * math.log(8)
    for keys, expected in (
        ({"attn_factor": 1 / usual}, 1.0),
        ({"yarn_attn_factor": 1.25}, 1.25),
        ({"yarn_attn_factor": 1.25, "ext_factor": 0.0}, 1.25),
        ({"log_multiplier": 1.0}, 1.0),
        ({"log_multiplier": 0.7}, usual / (1 + 0.07 * math.log(8))),
        ({"attn_factor": 2.0, "log_multiplier": 1.0}, 2.0),
    ):
        scaling = RopeScaling("yarn", 8.0, 32, **keys)
        assert make_rope("neox", 32, 1e4, scaling).scale == pytest.approx(expected), keys


def test_yarn_ramp_of_parts_of_pairs() -> None:
    """transformers 5.23, truncate=False, in float32."""
    expected = [1.0, 0.388342232, 0.120533988, 0.0222284924, 0.0125, 0.0070292661, 0.00395284733, 0.00222284929]
    rope = make_rope("neox", 32, 1e4, RopeScaling("yarn", 8.0, 32, truncate=False))
    assert rope.inv_freq[:8] == pytest.approx(expected, rel=2e-6)


def test_rotations_of_short_and_of_long_sequences() -> None:
    rope = make_rope("neox", 4, 1e4, RopeScaling("longrope", n_ctx_orig=64), [1, 2], [4, 8])
    assert rope.n_short == 64
    assert rope.of(False).inv_freq == pytest.approx([1, 0.005])
    assert rope.of(True).inv_freq == pytest.approx([0.25, 0.00125])
    plain = make_rope("neox", 4, 1e4)
    assert (plain.of(True).inv_freq == plain.inv_freq).all()


def test_yarn_without_extrapolation_is_linear() -> None:
    rope = make_rope("neox", 16, 1e4, RopeScaling("yarn", 4.0, 64, ext_factor=0.0))
    assert rope.inv_freq == pytest.approx(make_rope("neox", 16, 1e4, RopeScaling("linear", 4.0)).inv_freq)
    assert rope.scale == 1


def test_plain_linear_and_factors() -> None:
    plain = [1e4 ** (-2 * i / 6) for i in range(3)]
    assert make_rope("norm", 6, 1e4).inv_freq == pytest.approx(plain)
    assert make_rope("norm", 6, 1e4, RopeScaling("none", 8.0)).inv_freq == pytest.approx(plain)
    linear = make_rope("norm", 6, 1e4, RopeScaling("linear", 8.0, attn_factor=1.5))
    assert linear.inv_freq == pytest.approx([f / 8 for f in plain])
    assert linear.scale == 1.5
    factored = make_rope("norm", 6, 1e4, RopeScaling("linear", 2.0), factors=np.float32([1, 4, 32]))
    assert factored.inv_freq == pytest.approx([plain[0] / 2, plain[1] / 8, plain[2] / 64])


def test_yarn_scaling_comes_on_top_of_factors() -> None:
    scaling = RopeScaling("yarn", 8.0, 32)
    factors = np.linspace(1, 4, 16)
    expected = make_rope("norm", 32, 1e4, scaling).inv_freq / factors
    assert make_rope("norm", 32, 1e4, scaling, factors).inv_freq == pytest.approx(expected)


@pytest.mark.parametrize("style", ["norm", "neox"])
def test_rotation_turns_the_pairs_of_its_style(style: str) -> None:
    head_dim, n_rot, position = 10, 6, 5
    rope = make_rope(style, n_rot, 100.0, RopeScaling(attn_factor=2.0))
    x = np.random.default_rng(1).standard_normal((1, 2, head_dim))
    out = rotate(x, rope, np.array([position]))
    assert (out[..., n_rot:] == x[..., n_rot:]).all()
    for i in range(n_rot // 2):
        a, b = (2 * i, 2 * i + 1) if style == "norm" else (i, i + n_rot // 2)
        angle = position * 100.0 ** (-2 * i / n_rot)
        turned = (x[..., a] + 1j * x[..., b]) * complex(math.cos(angle), math.sin(angle)) * 2.0
        assert out[..., a] == pytest.approx(turned.real)
        assert out[..., b] == pytest.approx(turned.imag)
