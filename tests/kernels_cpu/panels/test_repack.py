"""Repacking into panels: each panel holds exactly the numbers that dequantizing the file's blocks gives."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cpu_ops import MemoryTensor, cpu, f32_tensor, random_tensor, tensor_of, unpack_panel

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import CHECKPOINT_TYPES, TENSOR_TYPES, type_by_name
from gguf_run.formats.blocks.unpack import INTEGER_FORMS
from gguf_run.formats.errors import FormatError
from gguf_run.kernels_cpu.panels.memory import CpuWeight
from gguf_run.kernels_cpu.panels.panels import PANEL_OF, ROWS, FloatPanel, IntPanel, matrix_bytes
from gguf_run.kernels_cpu.panels.repack import repack

ALL_HALVES = np.arange(65536, dtype=np.uint16)


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """NaN in the same places, everything else in every bit."""
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    wrong = (np.ascontiguousarray(actual).view(np.uint32) != expected.view(np.uint32)) & ~nan
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} differ"


def weight_of(n_threads: int, tensors: list[MemoryTensor]) -> CpuWeight:
    backend = cpu(n_threads)
    weight = backend.weight(tensors)
    backend.wait()
    return weight


def check_repack(tensors: list[MemoryTensor], n_threads: int = 3) -> None:
    weight = weight_of(n_threads, tensors)
    expected = np.concatenate([dequantize(t.blocks(), t.type) for t in tensors])
    assert sum(part.n_out for part in weight.parts) == len(expected)
    for part in weight.parts:
        values = unpack_panel(part, weight.n_in)
        exact = expected[part.first : part.first + part.n_out]
        if isinstance(part.panel, IntPanel) and part.panel.fine:  # d is below 0.1
            np.testing.assert_allclose(values[: part.n_out], exact, atol=0.1 / 65000)
            continue
        with np.errstate(all="ignore"):
            assert_same_bits(values[: part.n_out], exact)
        assert (values[part.n_out :] == 0).all(), "rows that fill the last panel are zeros"


@pytest.mark.parametrize("type_name", [type.name for type in (*TENSOR_TYPES, *CHECKPOINT_TYPES)])
def test_panels_hold_the_numbers_of_the_file(type_name: str) -> None:
    block = type_by_name(type_name).block_size
    for n_out, n_block in ((1, 1), (16, 2), (37, 3)):
        n_in = n_block * block if block > 1 else 5 * n_block
        check_repack([random_tensor(type_name, n_out, n_in, seed=n_out)])


def test_factors_of_matrices() -> None:
    """Of an NVFP4 tensor of three matrices of 24 rows, so that a panel holds rows of two."""
    tensor = random_tensor("NVFP4", 72, 128, seed=1)
    factors = (0.5, 4.0, 0.0625)
    weight = weight_of(2, [dataclasses.replace(tensor, scales=factors)])
    expected = dequantize(tensor.blocks(), tensor.type) * np.repeat(np.float32(factors), 24)[:, None]
    assert_same_bits(unpack_panel(weight.parts[0], weight.n_in)[:72], expected)


@pytest.mark.parametrize("type_name", [name for name in INTEGER_FORMS if name != "INT8"])  # a row of INT8 has one scale
def test_any_bytes_can_be_repacked(type_name: str) -> None:
    """Scales of infinity and NaN too: what dequantizes to them is in the panel."""
    type = type_by_name(type_name)
    blocks = np.random.default_rng(5).integers(0, 256, (64, 2 * type.type_size), np.uint8)
    blocks[0], blocks[1] = 0, 255
    tensor = tensor_of(blocks, type_name)
    panel = PANEL_OF[type_name]
    assert isinstance(panel, IntPanel)
    expected = dequantize(tensor.blocks(), type)
    with np.errstate(all="ignore"):
        values = unpack_panel(weight_of(2, [tensor]).parts[0], 2 * type.block_size)
    # infinity * 0 is NaN in both; infinity - infinity too
    assert_same_bits(values, expected)


@pytest.mark.parametrize("field", ["d", "m"])
def test_every_half_float_as_scale_and_minimum(field: str) -> None:
    """All 65536 of them, in a type whose panel keeps them as halves."""
    type = type_by_name("Q4_1")
    blocks = np.zeros((4096, 16), type.dtype)
    blocks["d"], blocks["m"], blocks["qs"] = 1, 0, 0x11
    blocks[field] = ALL_HALVES.view(np.float16).reshape(4096, 16)
    (part,) = weight_of(2, [tensor_of(blocks.view(np.uint8).reshape(4096, -1), "Q4_1")]).parts
    assert isinstance(part.panel, IntPanel)
    at = part.data.reshape(4096 // ROWS, 16, part.panel.span_bytes)[..., : part.panel.head_bytes]
    stored = np.ascontiguousarray(at).view(np.uint16).reshape(-1, 16, 2, ROWS)[:, :, int(field == "m")]
    stored = stored.transpose(0, 2, 1).reshape(-1)
    nan = np.isnan(ALL_HALVES.view(np.float16))
    np.testing.assert_array_equal(stored[~nan], ALL_HALVES[~nan])
    assert np.isnan(stored[nan].view(np.float16)).all()


def test_panels_are_shared_only_where_they_fit() -> None:
    """Tensors of one type in a row share panels, unless one before ends within a panel."""
    cases = {
        ("Q4_0 32", "Q4_0 16", "Q4_0 5"): [53],
        ("Q4_0 17", "Q4_0 16", "Q4_0 16"): [17, 32],
        ("Q4_0 16", "Q4_1 16", "Q4_0 16"): [16, 16, 16],
        ("F32 16", "F64 16", "F32 16"): [16, 16, 16],
    }
    for names, n_outs in cases.items():
        tensors = []
        for i, name in enumerate(names):
            type_name, n_out = name.split()
            tensors.append(random_tensor(type_name, int(n_out), 64, seed=i))
        assert [part.n_out for part in cpu(2).weight(tensors).parts] == n_outs
        check_repack(tensors)


@pytest.mark.parametrize("type_name", ["Q6_K", "BF16"])
def test_number_of_threads_does_not_matter(type_name: str) -> None:
    """A tensor large enough to be repacked in several pieces."""
    tensor = random_tensor(type_name, 16 * 250 + 1, 256)
    panel = PANEL_OF[type_name]
    results = []
    for n_threads in (1, 2, 7):
        out = np.zeros(251 * panel.group_bytes(256), np.uint8)
        with ThreadPoolExecutor(n_threads) as executor:
            repack([tensor], out, executor, n_threads)
        results.append(out)
    assert (results[0] == results[1]).all()
    assert (results[0] == results[2]).all()


@pytest.mark.parametrize("type_name", INTEGER_FORMS)
def test_panel_is_wide_enough(type_name: str) -> None:
    """u = q + offset is not negative and below 2^dot_bits for all q that a block can hold; AVX2 counts on it."""
    form, panel = INTEGER_FORMS[type_name], PANEL_OF[type_name]
    assert isinstance(panel, IntPanel)
    assert form.q_min + panel.offset >= 0
    assert form.q_max + panel.offset < 1 << panel.dot_bits
    assert panel.dot_bits <= panel.bits or panel.codebook
    assert panel.offset & panel.offset - 1 == 0


def test_bits_per_weight() -> None:
    """Panels cost no more than the file for the types of the first rank; IQ4_XS 1.5 % more."""
    first_rank = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL MXFP4 F32 F16 BF16 IQ4_XS"
    for type_name in first_rank.split():
        type, panel = type_by_name(type_name), PANEL_OF[type_name]
        extra = 16 * 2 if type_name == "IQ4_XS" else 0  # scales of 8 bits instead of 6
        assert panel.group_bytes(256) == 16 * 256 // type.block_size * type.type_size + extra


def test_checkpoints_take_their_own_width() -> None:
    """Issue 21: at most 2 % more than codes and scales in a checkpoint. 4-bit scales are f32 there, one for 64."""
    bits = {"FP8": 8, "INT": 8, "NF4": 4.5, "FP4": 4.5}
    for type in CHECKPOINT_TYPES:
        for n_in in (2048, 8192):
            stored = ROWS * n_in * bits[type.name[:3]] / 8
            assert stored <= matrix_bytes(type.name, n_in, ROWS) <= 1.02 * stored


def test_rows_of_a_panel_must_share_the_scales_of_rectangles() -> None:
    tensor = random_tensor("FP8_E4M3_128", 32, 256)
    tensor.data[17, :4] += 1
    with pytest.raises(FormatError, match=r"test: 16 rows .* must have one: give --quantize Q8_0"):
        weight_of(2, [tensor])


def test_data_starts_on_a_cache_line_and_is_counted() -> None:
    backend = cpu(2)
    before = backend.nbytes()["weights"]
    weight = backend.weight([f32_tensor(np.ones((17, 3)))])
    assert weight.parts[0].data.ctypes.data % 64 == 0
    assert isinstance(weight.parts[0].panel, FloatPanel)
    assert backend.nbytes()["weights"] - before == weight.parts[0].data.nbytes == 32 * 3 * 4


def test_vector_joins_tensors_of_any_type() -> None:
    tensors = [random_tensor(name, 1, 256, seed=i) for i, name in enumerate(("F32", "F16", "BF16", "Q4_0"))]
    expected = [dequantize(t.blocks(), t.type)[0] for t in tensors]
    assert_same_bits(cpu(2).vector(tensors), np.concatenate(expected))
