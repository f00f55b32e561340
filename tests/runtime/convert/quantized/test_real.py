"""Already quantized checkpoints as the libraries themselves write them (where they are installed)."""

import importlib.util

import numpy as np
import pytest
from quantized import decode, values
from quantpack import write_checkpoint

from gguf_run.runtime.convert.quantized.methods import RUN

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own
NAME = "model.layers.0.mlp.up_proj"
CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int32: "I32", torch.int64: "I64",
         torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}  # fmt: skip


def stored(tensor):
    """A torch tensor as (dtype in the file, values or bits)."""
    dtype = CODES[tensor.dtype]
    bits = {"BF16": torch.uint16, "F8_E4M3": torch.uint8}.get(dtype)
    tensor = tensor.detach().contiguous()
    return dtype, (tensor.view(bits) if bits else tensor).numpy()


def weight(n_out=64, n_in=256):
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(0))


def need(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")


def within_a_range(found, exact, group, limit=1e-3):
    """Figure 5 of issue 8, for codes that span the whole grid."""
    spread = exact.reshape(len(exact), -1, group)
    spread = (spread.max(2) - spread.min(2)).repeat(group, 1)
    assert (np.abs(found - exact) <= limit * spread + 1e-12).all()


@pytest.mark.parametrize(
    ("n_bits", "kind", "strategy", "group", "symmetric", "format", "kept"),
    [
        (4, "int", "group", 32, True, "pack-quantized", "Q4_0"),
        (4, "int", "group", 128, False, "pack-quantized", "Q4_1"),
        (8, "int", "group", 64, True, "pack-quantized", "Q8_0"),
        (3, "int", "group", 64, False, "pack-quantized", "Q4_1"),
        (4, "int", "channel", None, False, "pack-quantized", "Q4_1"),
        (8, "int", "channel", None, True, "int-quantized", "INT8"),
        (8, "int", "channel", None, False, "naive-quantized", "F32"),
        (8, "float", "tensor", None, True, "float-quantized", "FP8_E4M3"),
        (8, "float", "channel", None, True, "float-quantized", "FP8_E4M3"),
        (4, "float", "tensor_group", 16, True, "nvfp4-pack-quantized", "NVFP4"),
        (4, "float", "group", 32, True, "mxfp4-pack-quantized", "MXFP4"),
    ],
)
def test_compressed_tensors(tmp_path, n_bits, kind, strategy, group, symmetric, format, kept):
    need("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    w = weight()
    args = QuantizationArgs(num_bits=n_bits, type=kind, strategy=strategy, group_size=group, symmetric=symmetric)
    view = w.reshape(len(w), -1, group) if group else w[:, None]
    low, high = view.amin(2), view.amax(2)
    if strategy == "tensor":
        low, high = low.amin().reshape(1), high.amax().reshape(1)
    state = {"weight": w}
    if format == "nvfp4-pack-quantized":
        state["weight_global_scale"] = (448 * 6 / w.abs().amax()).reshape(1)
        state["weight_scale"] = (torch.maximum(low.abs(), high.abs()) / 6 * state["weight_global_scale"]).to(
            torch.float8_e4m3fn
        )
        state["weight_scale"] = state["weight_scale"].float()
    elif format == "mxfp4-pack-quantized":
        state["weight_scale"] = 2.0 ** torch.floor(torch.log2(torch.maximum(low.abs(), high.abs())) - 2)
    else:
        state["weight_scale"], state["weight_zero_point"] = calculate_qparams(low, high, args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(format)
    packed = compressor.compress(dict(state), scheme)
    exact = compressor.decompress(dict(packed), scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": n_bits}}},
    }
    found = decode(write_checkpoint(tmp_path, config, {f"{NAME}.{key}": stored(t) for key, t in packed.items()}), RUN)
    tensor = found.pop(f"{NAME}.weight")
    assert tensor.type.name == kept
    result = values(tensor)
    if format == "nvfp4-pack-quantized":
        result = result * values(found.pop(f"{NAME}.scale"))
    assert not found
    exact = exact.float().numpy()
    if kept in ("Q4_0", "Q4_1", "Q8_0"):
        within_a_range(result, exact, group or 256)
    else:  # the library rounds FP4 to BF16
        np.testing.assert_allclose(result, exact, rtol=8e-3 if "FP4" in kept else 1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_4bit(tmp_path, kind, double):
    need("bitsandbytes")
    import bitsandbytes.functional as F

    codes, state = F.quantize_4bit(weight(), quant_type=kind, compress_statistics=double, blocksize=64)
    tensors = {f"{NAME}.weight": stored(codes)}
    tensors |= {f"{NAME}.weight.{key}": stored(part) for key, part in state.as_dict(packed=True).items()}
    found = decode(write_checkpoint(tmp_path, {"quant_method": "bitsandbytes"}, tensors), RUN)
    assert found[f"{NAME}.weight"].type.name == kind.upper()
    exact = F.dequantize_4bit(codes, state).numpy()
    assert set(found) == {f"{NAME}.weight"}
    np.testing.assert_allclose(values(found[f"{NAME}.weight"]), exact, rtol=2e-6, atol=1e-7)


def test_bitsandbytes_8bit(tmp_path):
    need("bitsandbytes")
    import bitsandbytes.functional as F

    w = weight()
    codes, scb, _ = F.int8_vectorwise_quant(w.half())
    tensors = {
        f"{NAME}.weight": stored(codes),
        f"{NAME}.SCB": stored(scb),
        f"{NAME}.weight_format": ("U8", np.zeros(())),
    }
    folder, exact = write_checkpoint(tmp_path, {"quant_method": "bitsandbytes"}, tensors), codes * (scb / 127)[:, None]
    found = decode(folder)[f"{NAME}.weight"]
    assert found.type.name == "Q8_0"
    within_a_range(values(found), F.int8_vectorwise_dequant(codes, scb).numpy(), 256)
    found = decode(folder, RUN)[f"{NAME}.weight"]
    assert found.type.name == "INT8"
    np.testing.assert_allclose(values(found), exact.numpy(), rtol=2e-7)


def torchao_configs():
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    return {
        "int8": (Int8WeightOnlyConfig(version=2), "INT8", 256),
        "int4": (IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)), "Q4_0", 32),
        "int3": (IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerGroup(64)), "Q4_0", 64),
        "float8": (Float8WeightOnlyConfig(version=2), "FP8_E4M3", 256),
    }


@pytest.mark.parametrize("name", ["int8", "int4", "int3", "float8"])
def test_torchao(tmp_path, name):
    need("torchao")
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import quantize_

    config, kept, group = torchao_configs()[name]
    model = torch.nn.Sequential(torch.nn.Linear(256, 64))
    quantize_(model, config)
    state = model.state_dict()
    exact = state["0.weight"].dequantize().detach().numpy()
    tensors, metadata = flatten_tensor_state_dict(state)
    folder = write_checkpoint(
        tmp_path, {"quant_method": "torchao"}, {key: stored(part) for key, part in tensors.items()}, metadata
    )
    found = decode(folder, RUN)
    assert set(found) == {"0.weight", "0.bias"}
    assert found["0.weight"].type.name == kept
    if kept in ("INT8", "FP8_E4M3"):
        np.testing.assert_allclose(values(found["0.weight"]), exact, rtol=1e-6)
    else:
        within_a_range(values(found["0.weight"]), exact, group)


def test_mxfp4_as_transformers_reads_it(tmp_path):
    need("transformers")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(0)
    blocks, scales = rng.integers(0, 256, (2, 24, 3, 16), np.uint8), rng.integers(100, 140, (2, 24, 3), np.uint8)
    exact = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
    name = "model.layers.0.mlp.experts.down_proj"
    tensors = {f"{name}_blocks": ("U8", blocks), f"{name}_scales": ("U8", scales)}
    found = decode(write_checkpoint(tmp_path, {"quant_method": "mxfp4"}, tensors))[f"{name}.weight"]
    np.testing.assert_array_equal(values(found), exact.numpy().swapaxes(1, 2))
