"""Dequantizing against the gguf package (numpy), ggml itself (libgguf) and NumPy twins, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import gguf
import libgguf
import numpy as np
import pytest
from block_patterns import SPECIAL_F16, assert_same_bits, random_blocks, with_scales

from gguf_run.formats.blocks.coded import CODED_FORMS
from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import CHECKPOINT_TYPES, TENSOR_TYPES, type_by_name
from gguf_run.formats.blocks.unpack import INTEGER_FORMS
from gguf_run.formats.errors import FormatError

QUANTIZED = [type for type in TENSOR_TYPES if type.is_quantized]
BY_LIBGGUF = {"Q1_0"}  # not in gguf.quants
BY_TWIN = {"Q2_0", "Q8_1", "Q8_K"}  # in neither
NUMBERS = {
    "F32": np.array([0.0, -0.0, 1e-45, -3.5, np.inf, -np.inf, np.nan], np.float32),
    "F16": np.arange(65536, dtype=np.uint16).view(np.float16),
    "F64": np.array([0.1, 1e300, -1e300, 1e-300, -0.0, np.nan]),
    "I8": np.arange(-128, 128, dtype=np.int8),
    "I16": np.arange(-32768, 32768, dtype=np.int16),
    "I32": np.array([0, 1, -1, 2**24 + 1, 2**31 - 1, -(2**31)], np.int32),
    "I64": np.array([0, 2**63 - 1, -(2**63), 2**53 + 1], np.int64),
}

by_type = pytest.mark.parametrize("type", QUANTIZED, ids=lambda type: type.name)


def twin(blocks, type):
    """Types that no reference package dequantizes: q from the structured dtype, times d."""
    fields = blocks.reshape(-1).view(type.dtype)
    q = fields["qs"]
    if type.name == "Q2_0":
        q = ((q[..., None] >> np.array([0, 2, 4, 6])) & 3).astype(np.int8) - 1
    d = fields["d"].astype(np.float32)[:, None]
    return (d * q.reshape(len(fields), -1).astype(np.float32)).reshape(*blocks.shape[:-1], -1)


def by_ggml(blocks, type):
    """ggml's own C code."""
    n_rows, n = len(blocks), blocks.shape[1] // type.type_size * type.block_size
    return np.frombuffer(libgguf.dequantize_rows_raw(type.id, blocks, n_rows, n), np.float32).reshape(n_rows, n)


def reference(blocks, type):
    with np.errstate(all="ignore"):
        if type.name in BY_TWIN:
            return twin(blocks, type)
        if type.name in BY_LIBGGUF:
            return by_ggml(blocks.reshape(-1, blocks.shape[-1]), type).reshape(*blocks.shape[:-1], -1)
        return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[type.name])


@by_type
@pytest.mark.parametrize(("seed", "shape"), [(0, (1,)), (1, (7, 3)), (2, (2, 3, 5)), (3, (37, 13))])
def test_random_bytes(type, seed, shape):
    blocks = random_blocks(seed, shape, type)
    assert_same_bits(dequantize(blocks, type), reference(blocks, type))


@by_type
def test_special_blocks(type):
    uniform = np.repeat(np.arange(256, dtype=np.uint8), type.type_size).reshape(256, -1)  # all zeros .. all 0xFF
    assert_same_bits(dequantize(uniform, type), reference(uniform, type))
    for field in type.dtype.names:
        if type.dtype[field].kind == "f":
            with np.errstate(all="ignore"):
                values = SPECIAL_F16.view(np.float16).astype(type.dtype[field])
            blocks = with_scales(random_blocks(4, (1,), type), type, field, values)
            assert_same_bits(dequantize(blocks, type), reference(blocks, type))


@pytest.mark.parametrize(("name", "field"), [("Q8_0", "d"), ("Q4_1", "m")])
def test_every_f16(name, field):
    type = type_by_name(name)
    blocks = with_scales(random_blocks(0, (1,), type), type, field, NUMBERS["F16"])
    assert_same_bits(dequantize(blocks, type), reference(blocks, type))


@pytest.mark.parametrize(("name", "field"), [("MXFP4", "e"), ("NVFP4", "d")])
def test_every_small_scale(name, field):
    type = type_by_name(name)
    blocks = with_scales(random_blocks(0, (1,), type), type, field, np.arange(256, dtype=np.uint8))
    assert_same_bits(dequantize(blocks, type), reference(blocks, type))


@pytest.mark.parametrize("type", [t for t in QUANTIZED if t.name not in BY_TWIN], ids=lambda type: type.name)
def test_same_as_ggml(type):
    blocks = random_blocks(10, (64, 3), type)
    assert_same_bits(dequantize(blocks, type), by_ggml(blocks, type))


@pytest.mark.parametrize(
    ("names", "error"),  # of normal weights, as a part of their own size; quantizers of IQ1 and IQ2 start slowly
    [
        ("Q8_0", 0.01),
        ("Q6_K", 0.03),
        ("Q5_0 Q5_1 Q5_K", 0.05),
        ("Q4_0 Q4_1 Q4_K IQ4_NL IQ4_XS", 0.1),
        ("Q3_K MXFP4 NVFP4", 0.2),
        ("Q2_K", 0.4),
    ],
)
def test_what_ggml_quantizes(names, error):
    """Blocks as ggml writes them: the same bits as the reference, and near the weights that went in."""
    weights = np.random.default_rng(5).standard_normal((3, 1024)).astype(np.float32)
    for type in map(type_by_name, names.split()):
        blocks = np.frombuffer(libgguf.quantize_rows_raw(type.id, weights, 3, 1024, None), np.uint8).reshape(3, -1)
        actual = dequantize(blocks, type)
        assert_same_bits(actual, reference(blocks, type))
        assert_same_bits(actual, by_ggml(blocks, type))
        assert np.linalg.norm(actual - weights) < error * np.linalg.norm(weights)


@by_type
def test_integer_form(type):
    """scale * q (+ minimum) are the weights; q fills q_min..q_max; types without minimum leave it alone."""
    form = INTEGER_FORMS[type.name]
    assert form.type is type
    assert form.group in (16, 32)
    n_groups = type.block_size // form.group
    assert n_groups * form.group == type.block_size
    blocks = random_blocks(6, (300,), type)
    blocks.flags.writeable = False
    grid, unpack = form.grid(), form.unpack.real
    q = np.empty(type.block_size, np.int8)
    scale = np.empty(n_groups, np.float32)
    minimum = np.full(n_groups, 7.5, np.float32)
    factor = np.ones(2, np.float32)
    expected = dequantize(blocks, type).reshape(300, -1)
    seen = []
    for b in range(300):
        unpack(blocks, b * type.type_size, q, scale, minimum, factor, grid)
        with np.errstate(all="ignore"):
            weights = np.repeat(factor[0] * scale, form.group) * q.astype(np.float32)
            if form.has_minimum:
                weights = weights + np.repeat(factor[1] * minimum, form.group)
        assert_same_bits(weights, expected[b])
        assert form.has_minimum or (minimum == 7.5).all()
        assert form.shared or (factor == 1).all()
        assert not form.shared or (scale == np.rint(scale)).all()
        seen += [q.min(), q.max()]
    assert (min(seen), max(seen)) == (form.q_min, form.q_max)


def test_every_type_has_a_form():
    assert [*(type.name for type in QUANTIZED), "INT8"] == list(INTEGER_FORMS)
    assert {type.name for type in CHECKPOINT_TYPES} == {"INT8", *CODED_FORMS}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name):
    values = NUMBERS[name]
    with np.errstate(all="ignore"):
        expected = values.astype(np.float32)
    blocks = values.view(np.uint8).reshape(1, -1)
    assert_same_bits(dequantize(blocks, type_by_name(name)), expected.reshape(1, -1))
    odd = np.concatenate([np.zeros(1, np.uint8), blocks[0]])[1:]  # not aligned
    assert_same_bits(dequantize(odd, type_by_name(name)), expected)


def test_bf16():
    type = type_by_name("BF16")
    blocks = np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(256, -1)
    assert_same_bits(dequantize(blocks, type), gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.BF16))


@pytest.mark.parametrize("name", ["Q4_K", "F16", "BF16"])
def test_large_input_over_threads(name):
    type = type_by_name(name)
    blocks = random_blocks(8, (5, (3 << 20) // type.block_size // 5 + 1), type)
    assert_same_bits(dequantize(blocks, type), reference(blocks, type))


@pytest.mark.parametrize("name", ["Q4_0", "F16", "BF16"])
def test_views_of_the_input(name):
    """Any layout in memory, read-only or not; the input is left as it was and is not shared."""
    type = type_by_name(name)
    blocks = random_blocks(9, (6, 4), type)
    expected = reference(blocks, type)
    wide = np.zeros((12, blocks.shape[1] + 5), np.uint8)
    wide[::2, 2:-3] = blocks
    assert_same_bits(dequantize(wide[::2, 2:-3], type), expected)
    assert_same_bits(dequantize(np.asfortranarray(blocks), type), expected)
    assert_same_bits(dequantize(blocks[::-1], type), expected[::-1])
    before = blocks.copy()
    out = dequantize(blocks, type)
    assert blocks.flags.writeable
    out[:] = 1
    np.testing.assert_array_equal(blocks, before)
    blocks.flags.writeable = False
    assert_same_bits(dequantize(blocks, type), expected)


@pytest.mark.parametrize("name", ["Q6_K", "F32", "BF16", "I8"])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2), (2, 0, 1)])
def test_empty(name, shape):
    type = type_by_name(name)
    blocks = np.empty((*shape[:-1], shape[-1] * type.type_size), np.uint8)
    assert dequantize(blocks, type).shape == (*shape[:-1], shape[-1] * type.block_size)


@pytest.mark.parametrize(
    ("blocks", "found"),
    [
        (np.zeros(17, np.uint8), "(17,)"),
        (np.zeros((18, 2), np.uint8), "(18, 2)"),
        (np.array(0, np.uint8), "()"),
        (np.zeros(18, np.float32), "float32"),
    ],
)
def test_impossible_shapes(blocks, found):
    with pytest.raises(FormatError) as error:
        dequantize(blocks, type_by_name("Q4_0"))
    message = str(error.value)
    assert "Q4_0" in message
    assert found in message
    assert "18" in message


GENERIC_CPU = """
import sys
import numpy as np
from numba.core import event
from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.compiler.jit import kernel_cache_dir
from gguf_run.formats.blocks.types import type_by_name
with event.install_recorder("numba:compile") as compiled:
    data = np.load(sys.argv[1])
    np.savez(sys.argv[2], **{name: dequantize(data[name], type_by_name(name)) for name in data})
print(len(compiled.buffer), kernel_cache_dir())
"""


def test_generic_cpu_and_the_cache(tmp_path: Path):
    """A processor without FMA or AVX gives the same bits; a second process compiles nothing."""
    names = ["Q4_K", "Q6_K", "IQ2_XXS", "MXFP4"]
    blocks = {name: random_blocks(11, (3, 5), type_by_name(name)) for name in names}
    np.savez(tmp_path / "blocks.npz", **blocks)
    env = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path),  # Linux: other systems keep their cache folder
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
    }
    runs = []
    for i in range(2):
        out = tmp_path / f"out{i}.npz"
        command = [sys.executable, "-c", GENERIC_CPU, str(tmp_path / "blocks.npz"), str(out)]
        done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        runs.append(done.stdout.split(maxsplit=1))
        weights = np.load(out)
        for name in names:
            assert_same_bits(weights[name], reference(blocks[name], type_by_name(name)))
    (n_compiled, folder), (n_compiled_again, same_folder) = runs
    assert int(n_compiled) > 0
    if folder == same_folder:  # else the sources were edited in between
        assert int(n_compiled_again) == 0
