"""Checkpoints that run as they are: the types of their weights in memory, and the logits of transformers."""

import json
import re

import hf_tiny
import numpy as np
import pytest
import quantpack
import tiny
from cpu_ops import cpu, error
from numpy_backend import NumpyBackend
from quantpack import e4m3

from gguf_run.formats.blocks.coded import CODED_FORMS, float8
from gguf_run.formats.errors import FormatError, OptionError
from gguf_run.models.config import ModelConfig
from gguf_run.runtime.load.open_model import open_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.numpy").load_file

SIZES = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "num_attention_heads": 4, "rms_norm_eps": 1e-5}
SIZES |= {"num_key_value_heads": 2, "num_hidden_layers": 2}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def fp8(w, name, factors, end, dtype="F8_E4M3", most=448.0):
    """factors: of an array as large as w, the scales to store."""
    kind = torch.float8_e4m3fn if dtype == "F8_E4M3" else torch.float8_e5m2
    scale = factors(np.abs(w) / most).astype(np.float32)
    by_rows = scale.ndim < 2 or scale.shape == (len(w), 1)
    full = np.broadcast_to(scale, w.shape) if by_rows else scale.repeat(128, 0).repeat(128, 1)
    full = full[: len(w), : w.shape[1]]
    bits = torch.tensor(w / full).float().to(kind).view(torch.uint8).numpy()
    parts = {f"{name}.weight": (dtype, bits), f"{name}.weight_{end}": ("F32", scale)}
    return parts, (e4m3(bits) if most == 448 else float8(dtype)[bits].astype(np.float64)) * full


def by_tensor(w, name):
    return fp8(w, name, np.max, "scale")


def by_row(w, name):
    return fp8(w, name, lambda x: x.max(1, keepdims=True), "scale")


def by_row_e5m2(w, name):
    return fp8(w, name, lambda x: x.max(1, keepdims=True), "scale", "F8_E5M2", 57344.0)


def by_rectangle(w, name):
    def factors(x):
        wide = np.pad(x, [(0, -n % 128) for n in x.shape])
        return wide.reshape(len(wide) // 128, 128, -1, 128).max((1, 3))

    return fp8(w, name, factors, "scale_inv")


def int8(w, name):
    scale = (np.abs(w).max(1, keepdims=True) / 127).astype(np.float32)
    codes = np.round(w / scale)
    return {f"{name}.weight": ("I8", codes), f"{name}.weight_scale": ("F32", scale)}, codes * scale.astype(np.float64)


def llm_int8(w, name):
    scb = np.abs(w).max(1).astype(np.float32)
    codes = np.round(w * (127 / scb[:, None].astype(np.float64)))
    parts = {f"{name}.weight": ("I8", codes), f"{name}.SCB": ("F32", scb)}
    return parts, codes * (scb / np.float32(127)).astype(np.float64)[:, None]


def four_bits(kind, nested):
    def pack(w, name):
        table = CODED_FORMS[kind].table
        blocks = w.reshape(-1, 64)
        absmax = np.abs(blocks).max(1).astype(np.float32)
        codes = np.abs(blocks[..., None] / absmax[:, None, None] - table).argmin(-1).reshape(-1)
        parts, state = {f"{name}.weight.absmax": ("F32", absmax)}, {"shape": w.shape, "blocksize": 64}
        if nested:
            map_, offset = np.linspace(-1, 1, 256).astype(np.float32), absmax.mean()
            rest = np.pad(absmax - offset, (0, -len(absmax) % 256)).reshape(-1, 256)
            large = np.abs(rest).max(1)
            small = np.abs((rest / large[:, None])[..., None] - map_).argmin(-1)
            absmax = (map_[small] * large[:, None]).reshape(-1)[: len(absmax)] + offset
            parts = {f"{name}.weight.absmax": ("U8", small.reshape(-1)[: len(absmax)])}
            parts[f"{name}.weight.nested_quant_map"] = ("F32", map_)
            parts[f"{name}.weight.nested_absmax"] = ("F32", large)
            state |= {"nested_blocksize": 256, "nested_offset": float(offset)}
        parts[f"{name}.weight"] = ("U8", (codes[::2] << 4 | codes[1::2]).reshape(-1, 1))
        parts[f"{name}.weight.quant_map"] = ("F32", table)
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        parts[f"{name}.weight.quant_state.bitsandbytes__{kind.lower()}"] = ("U8", text)
        exact = (table[codes].reshape(-1, 64) * absmax[:, None]).reshape(w.shape)
        return parts, exact.astype(np.float64)

    return pack


BNB = {"quant_method": "bitsandbytes"}
# name -> (what packs a weight, quantization_config, the type in memory)
KINDS = {
    "fp8 of modelopt": (by_tensor, MODELOPT, "FP8_E4M3"),
    "fp8 of compressed-tensors": (by_row, COMPRESSED, "FP8_E4M3"),
    "e5m2": (by_row_e5m2, COMPRESSED, "FP8_E5M2"),
    "fp8 of deepseek": (by_rectangle, BLOCKS, "FP8_E4M3_128"),
    "int8": (int8, {**COMPRESSED, "format": "int-quantized"}, "INT8"),
    "LLM.int8": (llm_int8, BNB, "INT8"),
    "nf4": (four_bits("NF4", False), BNB, "NF4"),
    "nf4 twice": (four_bits("NF4", True), BNB, "NF4"),
    "fp4": (four_bits("FP4", False), BNB, "FP4"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Transformers' model before it is quantized, its folder, and its tensors by name."""
    folder = tmp_path_factory.mktemp("plain")
    model = hf_tiny.make("llama", folder, **SIZES)
    return model, folder, {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def write(folder, plain, pack, config):
    """Write the model with quantized projections. Return transformers' logits of the exact weights."""
    model, plain_folder, tensors = plain
    exact, stored = quantpack.packed_projections(tensors, pack)
    model.load_state_dict({name: torch.tensor(values).float() for name, values in exact.items()})
    quantpack.write_checkpoint(folder, None, stored)
    plain_config = json.loads((plain_folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**plain_config, "quantization_config": config}))
    hf_tiny.write_tokenizer(folder)
    return hf_tiny.logits(model, tiny.IDS)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(tmp_path, plain, kind):
    """Issue 21: 1e-5, in float64 and on the CPU with activations as they are."""
    pack, config, type_name = KINDS[kind]
    expected = write(tmp_path, plain, pack, config)
    has_integers = type_name in ("INT8", "NF4", "FP4")
    for activations in ("auto", "float") if has_integers else ("float",):
        wanted = type_name + "_F32" * (has_integers and activations == "float")
        with open_model(tmp_path, activations=activations) as file:
            names = [name for name in file.tensors if re.fullmatch(r"blk\..*(attn|ffn)_[a-z]+\.weight", name)]
            matrices = [file.tensors[name].type.name for name in names if "norm" not in name]
            assert matrices == [wanted] * 14
            model = ModelConfig.from_metadata(file.metadata, file.tensors)
            assert error(tiny.logits(model, file.tensors, NumpyBackend(np.float64), (90,)), expected) < 1e-5
            for way, pieces in tiny.WAYS.items():
                found = tiny.logits(model, file.tensors, cpu(2), pieces)
                if activations == "float":
                    assert error(found, expected) < 1e-5, way
                else:  # rounding activations to int8 costs 0.03 in this model
                    assert np.linalg.norm(found - expected) < 0.06 * np.linalg.norm(expected), way


@pytest.mark.parametrize("kind", ["fp8 of deepseek", "int8", "nf4"])
def test_experts(tmp_path, kind):
    """Matrices of their own in the checkpoint, which stand in one tensor here."""
    pack, config, type_name = KINDS[kind]
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 64, "num_attention_heads": 4}
    model = hf_tiny.make("qwen3moe", tmp_path / "plain", **sizes)
    exact, stored = {}, {}
    for name, values in load_file(tmp_path / "plain/model.safetensors").items():
        exact[name] = values.astype(np.float16)
        parts = {name: ("F16", exact[name])}
        if name.endswith("_proj.weight"):
            parts, exact[name] = pack(values.astype(np.float64), name.removesuffix(".weight"))
        stored |= parts
    for folder, tensors in (("exact", {name: ("F32", values) for name, values in exact.items()}), ("stored", stored)):
        quantpack.write_checkpoint(tmp_path / folder, None, tensors)
        hf_tiny.write_tokenizer(tmp_path / folder)
        values = json.loads((tmp_path / "plain/config.json").read_text())
        values |= {"quantization_config": config} if folder == "stored" else {}
        (tmp_path / folder / "config.json").write_text(json.dumps(values))
    expected = hf_tiny.logits(type(model).from_pretrained(tmp_path / "exact").float().eval(), tiny.IDS)
    with open_model(tmp_path / "stored", activations="float") as file:
        assert file.tensors["blk.1.ffn_down_exps.weight"].type.name == type_name + "_F32" * (kind != "fp8 of deepseek")
        model = ModelConfig.from_metadata(file.metadata, file.tensors)
        for way, pieces in tiny.WAYS.items():
            assert error(tiny.logits(model, file.tensors, cpu(2), pieces), expected) < 1e-5, way
    if kind != "nf4":  # which is not rounded at all
        with pytest.raises(OptionError, match="several matrices, allowed are auto and float"):
            open_model(tmp_path / "stored", activations="dynamic")


NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("kind", "end", "change", "message"),
    [
        ("fp8 of compressed-tensors", "weight_scale", lambda x: -x, r"up_proj.weight_scale. has scales -.* positive"),
        ("fp8 of compressed-tensors", "weight_scale", lambda x: x * np.nan, r"weight_scale. has scales nan to nan"),
        (
            "fp8 of compressed-tensors",
            "weight_scale",
            lambda x: x[:5],
            r"weight_scale. has the shape \(5, 1\), must be",
        ),
        ("fp8 of deepseek", "weight", lambda x: x | 0x7F, r"up_proj.weight. has codes that are NaN or infinite"),
        ("e5m2", "weight", lambda x: x | 0x7C, r"up_proj.weight. has codes that are NaN or infinite"),
        ("int8", "weight_scale", lambda x: x / 0, r"weight_scale. has scales inf to inf, must be positive numbers"),
        ("nf4", "weight.absmax", lambda x: x * np.nan, r"weight.absmax. has scales nan to nan"),
        ("nf4 twice", "weight.nested_absmax", lambda x: x[1:], r"nested_absmax. has the shape"),
        ("nf4 twice", "weight.nested_quant_map", lambda x: x[1:], r"nested_quant_map. has the shape \(255,\), must be"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide")
def test_bad_numbers_are_one_line(tmp_path, plain, kind, end, change, message):
    pack, config, _ = KINDS[kind]

    def damaged(w, name):
        parts, exact = pack(w, name)
        if name == NAME:
            dtype, values = parts[f"{name}.{end}"]
            parts[f"{name}.{end}"] = dtype, change(values)
        return parts, exact

    write(tmp_path, plain, damaged, config)
    with pytest.raises(FormatError, match=message) as caught, open_model(tmp_path) as file:
        file.tensors["blk.1.ffn_up.weight"].blocks()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_activations_of_the_checkpoint(tmp_path, plain, kind):
    """transformers with hooks that round what each projection reads. A number may fall on the other side of a half."""
    scales = {}

    def pack(w, name):
        parts, exact = by_tensor(w, name)
        scales[name] = np.float32(0.02 + 0.0001 * len(scales))
        return parts | {f"{name}.input_scale": ("F32", scales[name])}, exact

    exact = write(tmp_path, plain, pack, MODELOPT)

    def rounded(name, x):
        scale = torch.tensor(scales[name]) if kind == "static" else x.abs().amax(-1, keepdim=True) / 448
        scaled = x * (1 / scale) if kind == "static" else x / scale
        return scaled.clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    model, hooks = plain[0], []
    for name, module in model.named_modules():
        if name in scales:
            hook = lambda module, inputs, name=name: (rounded(name, inputs[0]),)  # noqa: E731
            hooks.append(module.register_forward_pre_hook(hook))
    expected = hf_tiny.logits(model, tiny.IDS)
    for hook in hooks:
        hook.remove()
    with open_model(tmp_path, activations=kind) as file:
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
        found = tiny.logits(config, file.tensors, cpu(2), (90,))
    errors = [np.linalg.norm(x - expected, axis=1) / np.linalg.norm(expected, axis=1) for x in (found, exact)]
    assert errors[0][:6].max() < 1e-5
    assert errors[0].mean() < 0.1 * errors[1].mean()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"--activations static: blk\.0\.attn_k\.weight has no input_scale: give --activations dynamic"),
        ({"input_scale": 0.0}, r"--activations static: blk\.0\.attn_k\.input_scale is 0\.0, must be positive: give"),
        ({"input_scale": np.nan}, r"input_scale is nan, must be positive"),
    ],
)
def test_scales_that_static_cannot_use(tmp_path, plain, change, message):
    pack, config, _ = KINDS["fp8 of modelopt"]

    def static(w, name):
        parts, exact = pack(w, name)
        return parts | {f"{name}.{key}": ("F32", np.float32(value)) for key, value in change.items()}, exact

    write(tmp_path, plain, static, config)
    with pytest.raises(OptionError, match=message):
        open_model(tmp_path, activations="static")
