"""Already quantized checkpoints against what their formats say, in float64; kept blocks against the same."""

import json

import numpy as np
import pytest
import quantpack
from quantized import decode, values
from quantpack import E2M1, e4m3, nibble_pairs, write_checkpoint

from gguf_run.formats.errors import GgufRunError

NAME = "model.layers.0.mlp.up_proj"
N_OUT, N_IN = 96, 256  # three words of 32 outputs


def grid(rng, n_bits, group, symmetric, n_out=N_OUT, n_in=N_IN):
    n_group = n_in // group
    codes = rng.integers(0, 1 << n_bits, (n_out, n_in))
    zero = np.full((n_out, n_group), 1 << n_bits - 1) if symmetric else rng.integers(0, 1 << n_bits, (n_out, n_group))
    scale = rng.uniform(1e-3, 0.1, (n_out, n_group)).astype(np.float16)
    return codes, zero, scale


def expected(codes, zero, scale, groups):
    return scale.astype(np.float64)[:, groups] * (codes - zero[:, groups])


def assert_kept(tensor, type_name, exact, scale, groups, n_bits=4):
    """Figure 5 of issue 8: no weight is further off than 1e-3 of the range of its block."""
    assert tensor.type.name == type_name
    found = values(tensor)
    if type_name != "Q4_1":  # the scale is a half float already
        np.testing.assert_array_equal(found, exact.astype(np.float32))
    error = np.abs(found - exact) / (scale.astype(np.float64)[:, groups] * ((1 << n_bits) - 1))
    assert error.max() <= 1e-3


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize(
    ("n_bits", "group", "symmetric", "kept"),
    [
        (4, 32, True, "Q4_0"),
        (4, 64, False, "Q4_1"),
        (4, 256, False, "Q4_1"),
        (8, 128, True, "Q8_0"),
        (8, 128, False, "F32"),
        (4, 16, True, "F32"),
        (3, 32, False, "Q4_1"),
        (2, 64, True, "Q4_0"),
    ],
)
def test_gptq(tmp_path, n_bits, group, symmetric, kept, v2):
    rng = np.random.default_rng(n_bits + group)
    codes, zero, scale = grid(rng, n_bits, group, symmetric)
    zero = np.maximum(zero, 0 if v2 else 1)
    groups = np.arange(N_IN) // group
    tensors = quantpack.gptq(codes, zero, scale, groups, n_bits=n_bits, v2=v2, name=NAME)
    config = {"quant_method": "gptq", "bits": n_bits, "checkpoint_format": "gptq_v2" if v2 else "gptq"}
    tensors[f"{NAME}.bias"] = ("F16", np.ones(N_OUT))
    found = decode(write_checkpoint(tmp_path, config, tensors))
    assert set(found) == {f"{NAME}.weight", f"{NAME}.bias"}
    tensor, exact = found[f"{NAME}.weight"], expected(codes, zero, scale, groups)
    assert tensor.ne == (N_IN, N_OUT)
    if kept == "F32":
        assert tensor.type.name == kept
        np.testing.assert_array_equal(values(tensor), exact.astype(np.float32))
    else:
        assert_kept(tensor, kept, exact, scale, groups, n_bits)


def test_gptq_zero_point_of_zero_in_version_1(tmp_path):
    """GPTQModel subtracts one from whole words, so that a zero borrows from its neighbour."""
    rng = np.random.default_rng(0)
    codes, zero, scale = grid(rng, 4, 64, False)
    zero[:, :2] = 0
    groups = np.arange(N_IN) // 64
    tensors = quantpack.gptq(codes, zero, scale, groups, n_bits=4, v2=True, name=NAME)
    words = tensors[f"{NAME}.qzeros"][1].view(np.uint32) - np.uint32(0x11111111)
    tensors[f"{NAME}.qzeros"] = ("I32", words.view(np.int32))
    found = decode(write_checkpoint(tmp_path, {"quant_method": "gptq"}, tensors))[f"{NAME}.weight"]
    assert_kept(found, "Q4_1", expected(codes, zero, scale, groups), scale, groups)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_files_of_old_checkpoints(tmp_path, name):
    """Before transformers knew GPTQ and AWQ, config.json said nothing."""
    codes, zero, scale = grid(np.random.default_rng(0), 4, 64, True)
    groups = np.arange(N_IN) // 64
    if name == "quant_config.json":
        tensors, kept = (
            quantpack.awq_gemm(codes, zero, scale, NAME),
            {"w_bit": 4, "q_group_size": 64, "version": "GEMM"},
        )
    else:
        tensors, kept = quantpack.gptq(codes, zero, scale, groups, n_bits=4, v2=False, name=NAME), {"bits": 4}
    write_checkpoint(tmp_path, None, tensors)
    (tmp_path / name).write_text(json.dumps(kept))
    assert_kept(decode(tmp_path)[f"{NAME}.weight"], "Q4_0", expected(codes, zero, scale, groups), scale, groups)


@pytest.mark.parametrize("run", [1, 32])
def test_gptq_act_order(tmp_path, run):
    """Groups in any order: of single columns, or of runs of 32, whose blocks stay whole."""
    rng = np.random.default_rng(run)
    codes, zero, scale = grid(rng, 4, 64, False)
    zero = np.maximum(zero, 1)
    groups = rng.permutation(np.repeat(np.arange(4), 64 // run)).repeat(run)
    tensors = quantpack.gptq(codes, zero, scale, groups, n_bits=4, v2=False, name=NAME)
    tensor = decode(write_checkpoint(tmp_path, {"quant_method": "gptq", "desc_act": True}, tensors))[f"{NAME}.weight"]
    exact = expected(codes, zero, scale, groups)
    if run == 32:
        assert_kept(tensor, "Q4_1", exact, scale, groups)
    else:
        assert tensor.type.name == "F32"
        np.testing.assert_array_equal(values(tensor), exact.astype(np.float32))


@pytest.mark.parametrize("group", [128, 256])
def test_marlin(tmp_path, group):
    codes, zero, scale = grid(np.random.default_rng(1), 4, group, True, n_out=256)
    groups = np.arange(N_IN) // group
    tensors = {**quantpack.marlin(codes, scale, NAME), f"{NAME}.workspace": ("I32", np.zeros(4))}
    found = decode(write_checkpoint(tmp_path, {"quant_method": "gptq", "checkpoint_format": "marlin"}, tensors))
    assert set(found) == {f"{NAME}.weight"}
    assert_kept(found[f"{NAME}.weight"], "Q4_0", expected(codes, zero, scale, groups), scale, groups)


@pytest.mark.parametrize("version", ["gemm", "GEMV"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_awq(tmp_path, version, group):
    codes, zero, scale = grid(np.random.default_rng(group), 4, group, False)
    groups = np.arange(N_IN) // group
    pack = quantpack.awq_gemm if version == "gemm" else quantpack.awq_gemv
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": version}
    tensor = decode(write_checkpoint(tmp_path, config, pack(codes, zero, scale, NAME)))[f"{NAME}.weight"]
    assert_kept(tensor, "Q4_1", expected(codes, zero, scale, groups), scale, groups)


def test_scales_that_a_half_float_cannot_hold_are_not_kept(tmp_path):
    codes = np.random.default_rng(0).integers(0, 16, (32, 64))
    bits, scale = quantpack.bf16(np.full((32, 2), 3e-7))
    groups = np.arange(64) // 32
    tensors = quantpack.awq_gemv(codes, np.full((32, 2), 8), np.zeros((32, 2)), NAME)
    stored = np.zeros((32, 16), np.uint16)
    stored[:, :2] = bits
    tensors[f"{NAME}.scales"] = ("BF16", stored)
    config = {"quant_method": "awq", "group_size": 32, "version": "gemv"}
    tensor = decode(write_checkpoint(tmp_path, config, tensors))[f"{NAME}.weight"]
    assert tensor.type.name == "F32"
    np.testing.assert_array_equal(values(tensor), (scale[:, groups] * (codes - 8)).astype(np.float32))


@pytest.mark.parametrize(
    ("n_bits", "group", "kept"), [(4, 64, "Q4_1"), (4, 32, "Q4_1"), (3, 64, "Q4_1"), (6, 64, "F32"), (8, 128, "F32")]
)
@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_mlx(tmp_path, n_bits, group, kept, key):
    rng = np.random.default_rng(n_bits + group)
    codes, _, scale = grid(rng, n_bits, group, False)
    bias = rng.normal(0, 0.1, scale.shape).astype(np.float16)
    words = quantpack.pack_bits(codes.T, n_bits).T.view(np.uint32)
    tensors = {f"{NAME}.weight": ("U32", words), f"{NAME}.scales": ("F16", scale), f"{NAME}.biases": ("F16", bias)}
    other = "model.layers.0.mlp.down_proj"  # a module with numbers of its own
    tensors |= {name.replace(NAME, other): value for name, value in tensors.items()}
    numbers = {"group_size": group, "bits": n_bits}
    config = {"group_size": 64, "bits": 5, NAME: numbers, other: numbers}
    folder = write_checkpoint(tmp_path, None, tensors)
    values_of_config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values_of_config | {key: config}))
    found = decode(folder)
    assert found.keys() == {f"{NAME}.weight", f"{other}.weight"}
    groups = np.arange(N_IN) // group
    exact = scale.astype(np.float64)[:, groups] * codes + bias.astype(np.float64)[:, groups]
    for tensor in found.values():
        assert tensor.type.name == kept
        np.testing.assert_allclose(values(tensor), exact, rtol=0, atol=1e-6)


def test_mlx_that_half_floats_cannot_hold_and_other_modes(tmp_path):
    rng = np.random.default_rng(5)
    codes, _, _ = grid(rng, 4, 64, False)
    bits, scale = quantpack.bf16(rng.uniform(1e-9, 2e-9, (N_OUT, N_IN // 64)))
    words = quantpack.pack_bits(codes.T, 4).T.view(np.uint32)
    parts = {"weight": ("U32", words), "scales": ("BF16", bits), "biases": ("BF16", bits)}
    tensors = {f"{NAME}.{end}": part for end, part in parts.items()}
    folder = write_checkpoint(tmp_path, {"group_size": 64, "bits": 4}, tensors)
    (tensor,) = decode(folder).values()
    assert tensor.type.name == "F32"  # exact, where a block would round
    groups = np.arange(N_IN) // 64
    np.testing.assert_allclose(values(tensor), scale[:, groups] * codes + scale[:, groups], rtol=1e-6)
    write_checkpoint(tmp_path, {"group_size": 32, "bits": 4, "mode": "mxfp4"}, tensors)
    with pytest.raises(GgufRunError, match=r"is quantized as .mxfp4. with 4 bits in groups of 32, which is not known"):
        decode(folder)


def fp8_scales(rng, kind):
    """A scale's shape and the same scales for each weight of 200 x 320: the last blocks are cut off."""
    shape = {"tensor": (), "row": (200,), "channel": (200, 1), "block": (2, 3), "modelopt": (2, 1, 3, 1)}[kind]
    scale = rng.uniform(0.01, 1, shape).astype(np.float32)
    if scale.size == 6:
        return scale, scale.reshape(2, 3).repeat(128, 0).repeat(128, 1)[:200, :320]
    return scale, np.broadcast_to(scale.reshape(-1, 1), (200, 320))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("kind", ["tensor", "row", "channel", "block", "modelopt"])
def test_fp8(tmp_path, dtype, kind):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 0x7C, (200, 320)) | rng.integers(0, 2, (200, 320)) << 7
    scale, full = fp8_scales(rng, kind)
    name = f"{NAME}.weight_scale" + "_inv" * (kind == "block")
    tensors = {f"{NAME}.weight": (dtype, bits), name: ("F32", scale), f"{NAME}.input_scale": ("F32", np.ones(()))}
    tensors["model.norm.weight"] = ("F16", np.ones(320))
    found = decode(write_checkpoint(tmp_path, {"quant_method": "fp8", "weight_block_size": [128, 128]}, tensors))
    assert set(found) == {f"{NAME}.weight", "model.norm.weight"}
    weights = e4m3(bits) if dtype == "F8_E4M3" else (bits.astype(np.uint16) << 8).view(np.float16).astype(np.float64)
    np.testing.assert_array_equal(values(found[f"{NAME}.weight"]), (weights * full).astype(np.float32))


def test_fp8_experts_of_one_tensor(tmp_path):
    rng = np.random.default_rng(0)
    bits, scale = rng.integers(0, 0x7C, (3, 128, 64)), rng.uniform(0.1, 1, (3, 4, 2)).astype(np.float32)
    tensors = {"experts.down_proj": ("F8_E4M3", bits), "experts.down_proj_scale_inv": ("F32", scale)}
    config = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    found = decode(write_checkpoint(tmp_path, config, tensors))["experts.down_proj"]
    np.testing.assert_array_equal(values(found), (e4m3(bits) * scale.repeat(32, 1).repeat(32, 2)).astype(np.float32))


@pytest.mark.parametrize("source", ["modelopt", "compressed-tensors", "hf_quant_config"])
def test_nvfp4(tmp_path, source):
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(0, 16, (48, 192)), rng.integers(1, 0x7F, (48, 12))
    factor = np.float32(0.25 if source == "compressed-tensors" else 1 / 7)
    config = {"quant_method": source, "quant_algo": "NVFP4"}
    names = {"weight": nibble_pairs(codes), "weight_scale_2": factor}
    if source == "compressed-tensors":
        config = {"quant_method": source, "format": "nvfp4-pack-quantized", "config_groups": {}}
        names = {"weight_packed": nibble_pairs(codes), "weight_global_scale": np.array([1 / factor])}
    tensors = {f"{NAME}.{name}": ("U8" if array.ndim == 2 else "F32", array) for name, array in names.items()}
    tensors[f"{NAME}.weight_scale"] = ("F8_E4M3", scale)
    write_checkpoint(tmp_path, None if source == "hf_quant_config" else config, tensors)
    if source == "hf_quant_config":
        text = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(text))
    found = decode(tmp_path)
    assert found[f"{NAME}.weight"].type.name == "NVFP4"
    np.testing.assert_array_equal(values(found[f"{NAME}.weight"]), E2M1[codes] * e4m3(scale).repeat(16, 1))
    assert values(found[f"{NAME}.scale"]).tolist() == [factor]


def test_nvfp4_rows_of_no_whole_blocks(tmp_path):
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(0, 16, (8, 96)), rng.integers(1, 0x7F, (8, 6))
    tensors = {f"{NAME}.weight": ("U8", nibble_pairs(codes)), f"{NAME}.weight_scale": ("F8_E4M3", scale)}
    tensors[f"{NAME}.weight_scale_2"] = ("F32", np.float32(0.5))
    found = decode(write_checkpoint(tmp_path, {"quant_method": "modelopt"}, tensors))
    assert set(found) == {f"{NAME}.weight"}
    assert found[f"{NAME}.weight"].type.name == "F32"
    np.testing.assert_array_equal(values(found[f"{NAME}.weight"]), E2M1[codes] * e4m3(scale).repeat(16, 1) / 2)


def test_mxfp4_of_gpt_oss(tmp_path):
    rng = np.random.default_rng(0)
    codes, exponent = rng.integers(0, 16, (2, 24, 96)), rng.integers(100, 140, (2, 24, 3))
    blocks = nibble_pairs(codes).reshape(2, 24, 3, 16)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {
        f"{name}_blocks": ("U8", blocks),
        f"{name}_scales": ("U8", exponent),
        f"{name}_bias": ("F32", np.ones(4)),
    }
    found = decode(write_checkpoint(tmp_path, {"quant_method": "mxfp4"}, tensors))
    assert set(found) == {f"{name}.weight", f"{name}_bias"}
    tensor = found[f"{name}.weight"]
    assert tensor.type.name == "MXFP4"
    assert tensor.ne == (96, 24, 2)
    np.testing.assert_array_equal(values(tensor), E2M1[codes] * 2.0 ** (exponent.repeat(32, 2) - 127.0))


def bnb_state(kind, shape, **more):
    state = {"quant_type": kind, "blocksize": 64, "shape": list(shape), "dtype": "bfloat16", **more}
    return ("U8", np.frombuffer(json.dumps(state).encode(), np.uint8))


@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_4bit(tmp_path, double):
    rng = np.random.default_rng(0)
    shape = (37, 40)  # blocks of 64 go over the ends of rows
    codes, table = rng.integers(0, 16, 37 * 40), rng.uniform(-1, 1, 16).astype(np.float32)
    n_block = -(-len(codes) // 64)
    tensors = {
        f"{NAME}.weight": ("U8", (codes[::2] << 4 | codes[1::2]).reshape(-1, 1)),
        f"{NAME}.weight.quant_map": ("F32", table),
        f"{NAME}.weight.quant_state.bitsandbytes__nf4": bnb_state("nf4", shape),
    }
    absmax = rng.uniform(0.1, 1, n_block).astype(np.float32)
    tensors[f"{NAME}.weight.absmax"] = ("F32", absmax)
    if double:
        nested, big = (
            rng.uniform(-1, 1, 256).astype(np.float32),
            rng.uniform(0.5, 1, -(-n_block // 16)).astype(np.float32),
        )
        small = rng.integers(0, 256, n_block)
        absmax = nested[small] * big.repeat(16)[:n_block] + np.float32(0.375)
        tensors[f"{NAME}.weight.absmax"] = ("U8", small)
        tensors[f"{NAME}.weight.nested_quant_map"] = ("F32", nested)
        tensors[f"{NAME}.weight.nested_absmax"] = ("F32", big)
        state = bnb_state("nf4", shape, nested_blocksize=16, nested_offset=0.375, nested_dtype="float32")
        tensors[f"{NAME}.weight.quant_state.bitsandbytes__nf4"] = state
    found = decode(write_checkpoint(tmp_path, {"quant_method": "bitsandbytes", "load_in_4bit": True}, tensors))
    assert set(found) == {f"{NAME}.weight"}
    exact = (table[codes] * absmax.repeat(64)[: len(codes)]).reshape(shape)
    np.testing.assert_array_equal(values(found[f"{NAME}.weight"]), exact)


def test_bitsandbytes_8bit(tmp_path):
    rng = np.random.default_rng(0)
    codes, scb = rng.integers(-127, 128, (24, 64)), rng.uniform(0.5, 3, 24).astype(np.float32)
    tensors = {
        f"{NAME}.weight": ("I8", codes),
        f"{NAME}.SCB": ("F32", scb),
        f"{NAME}.weight_format": ("U8", np.zeros(())),
    }
    found = decode(write_checkpoint(tmp_path, {"quant_method": "bitsandbytes", "load_in_8bit": True}, tensors))
    assert set(found) == {f"{NAME}.weight"}
    assert found[f"{NAME}.weight"].type.name == "Q8_0"
    error = np.abs(values(found[f"{NAME}.weight"]) - codes * (scb.astype(np.float64) / 127)[:, None])
    assert (error <= 1e-3 * 2 * scb[:, None]).all()


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_torchao_int4(tmp_path, offset):
    """Int4Tensor, which needs a GPU to be made: weight = scale * signed code + zero point, by group of a column."""
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(0, 16, (48, 128)), quantpack.bf16(rng.uniform(0.01, 0.1, (2, 48)))
    zero = quantpack.bf16(rng.uniform(-1, 1, (2, 48)) * offset)
    signed = (codes - 8) & 15
    module = NAME.rpartition(".")[0]
    tensors = {
        f"{module}.up_proj._weight_qdata": ("U8", nibble_pairs(signed)),
        f"{module}.up_proj._weight_scale": ("BF16", scale[0]),
        f"{module}.up_proj._weight_zero_point": ("BF16", zero[0]),
    }
    described = {"_type": "Int4Tensor", "_data": {"block_size": [1, 64], "shape": [48, 128]}, "_tensor_data_names": []}
    metadata = {f"{NAME}.weight": json.dumps(described)}
    found = decode(write_checkpoint(tmp_path, {"quant_method": "torchao"}, tensors, metadata))
    assert set(found) == {f"{NAME}.weight"}
    groups = np.arange(128) // 64
    exact = scale[1].T.astype(np.float64)[:, groups] * (codes - 8) + zero[1].T[:, groups]
    assert_kept(found[f"{NAME}.weight"], "Q4_1" if offset else "Q4_0", exact, scale[1].T, groups)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (
            {"quant_method": "aqlm"},
            r"config.json: quantized with .aqlm., which is not known: gptq .*get the model before",
        ),
        ({"quant_method": "awq", "version": "gemv_fast"}, r"awq with version .gemv_fast.: known are gemm gemv"),
        ({"checkpoint_format": "gptq_p"}, r"gptq with checkpoint_format .gptq_p.: known are gptq gptq_v2 marlin"),
        ({"scales": None}, r"there is no tensor .*up_proj\.scales.*which belongs to the quantized weight"),
        ({"qzeros": ("I32", np.zeros((4, 7)))}, r"qweight. has the shape .*qzeros"),
        ({"qzeros": ("F32", np.zeros((4, 12)))}, r"qzeros. has values of type F32, must be I32"),
        ({"g_idx": ("I32", np.full(N_IN, 4))}, r"g_idx. has groups 4 to 4, must be 0 to 3"),
        ({"g_idx": ("I32", np.zeros(N_IN - 1))}, r"g_idx. has the shape \(255,\), must be \(256,\)"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, error):
    codes, zero, scale = grid(np.random.default_rng(0), 4, 64, True)
    tensors = quantpack.gptq(codes, zero, scale, np.arange(N_IN) // 64, n_bits=4, v2=False, name=NAME)
    config = {"quant_method": "gptq"}
    for key, value in change.items():
        if isinstance(value, str):
            config[key] = value
        elif value is None:
            del tensors[f"{NAME}.{key}"]
        else:
            tensors[f"{NAME}.{key}"] = value
    with pytest.raises(GgufRunError, match=error) as caught:
        decode(write_checkpoint(tmp_path, config, tensors))
    assert "\n" not in str(caught.value)
