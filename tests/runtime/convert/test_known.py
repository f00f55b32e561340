"""All keys that transformers' models read: another value gives transformers' logits, or the converter says so."""

import importlib
import inspect
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import hf_tiny
import numpy as np
import pytest
from numpy.typing import NDArray
from numpy_backend import NumpyBackend

from gguf_run.formats.errors import GgufRunError
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder
from gguf_run.runtime.convert import known, open_checkpoint
from gguf_run.runtime.convert.metadata import layout_of
from gguf_run.runtime.convert.stored.checkpoint import Config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IDS = [(7 * i * i + 3 * i + 2) % hf_tiny.N_VOCAB for i in range(40)]
FAMILIES = [name for name in hf_tiny.TINY if name not in ("internlm2", "deepseek", "llama31", "phi3-longrope")]

# Other values of a key. A number or a truth value that is not here becomes another one by itself.
OTHERS: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu", "gelu_pytorch_tanh", "silu"), "hidden_activation": ("gelu", "silu"),
    "num_attention_heads": (2,), "num_key_value_heads": (1, 6), "num_hidden_layers": (1,), "head_dim": (32,),
    "vocab_size": (), "hidden_size": (48,), "intermediate_size": (72,), "moe_intermediate_size": (24,),
    "shared_expert_intermediate_size": (40,), "num_experts": (3,), "num_local_experts": (3,),
    "num_experts_per_tok": (1, 3), "mlp_only_layers": ([0], [1]), "decoder_sparse_step": (2,), "clip_qkv": (0.5,),
    "rms_norm_eps": (1e-2,), "layer_norm_eps": (1e-2,), "norm_epsilon": (1e-2,),
    "sliding_window": (8, 12, None), "max_window_layers": (0, 1), "use_sliding_window": (True,),
    "layer_types": (["full_attention", "sliding_attention"], ["sliding_attention"] * 2),
    "no_rope_layers": ([1, 1, 1, 1], [0, 1, 0, 1]), "no_rope_layer_interval": (2,),
    "attn_logit_softcapping": (None, 2.0), "final_logit_softcapping": (None, 5.0), "query_pre_attn_scalar": (7,),
    "use_bidirectional_attention": (True,), "max_position_embeddings": (32, 512),
    "original_max_position_embeddings": (64,),
}  # fmt: skip
# Keys that transformers lets depend on each other: values that go together.
TOGETHER: tuple[dict[str, Any], ...] = (
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
)
_BASE = {"rope_theta": 1e4}
_YARN = {**_BASE, "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
_LLAMA3 = {**_BASE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}  # fmt: skip
_LONG = {**_BASE, "rope_type": "longrope", "short_factor": [1 + 0.1 * i for i in range(8)],
         "long_factor": [2 + 0.1 * i for i in range(8)], "original_max_position_embeddings": 64}  # fmt: skip
_PART = {**_LONG, "partial_rotary_factor": 0.5, "short_factor": [1, 1.5, 2, 3], "long_factor": [2, 3, 5, 7]}
ROTATIONS: tuple[dict[str, Any], ...] = (
    {"rope_theta": 5e3},
    {**_BASE, "rope_type": "linear", "factor": 4.0},
    _YARN,
    {**_YARN, "attention_factor": 1.7},
    _LLAMA3,
    _LONG,
    {**_LONG, "original_max_position_embeddings": 32},
    {**_BASE, "partial_rotary_factor": 0.5},
    _PART,
)
# The same code reads these in all families: one family is enough.
MORE_ROTATIONS: tuple[dict[str, Any], ...] = (
    {**_BASE, "rope_type": "dynamic", "factor": 4.0},
    {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    {**_YARN, "mscale": 0.7, "mscale_all_dim": 0.7},
    {**_YARN, "truncate": False},
    {**_YARN, "truncate": True},
    {**_YARN, "beta_fast": 8.0},
    {**_YARN, "beta_slow": 2.0},
    {**_YARN, "beta_slow": 20.0},
    {**_YARN, "factor": None},
    {**_YARN, "original_max_position_embeddings": 16},
    {**_YARN, "attn_factor": 2.0},
    {**_LLAMA3, "low_freq_factor": 2.0},
    {**_LLAMA3, "high_freq_factor": 8.0},
    {key: value for key, value in _LLAMA3.items() if not key.startswith("original")},
    {**_LONG, "attention_factor": 1.5},
    {**_LONG, "factor": 3.0},
    {**_BASE, "rope_type": "proportional", "partial_rotary_factor": 0.5},
)
# Sizes change the shapes of tensors, which the converter compares with config.json whatever the architecture is.
SIZES = ("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "hidden_size", "intermediate_size",
         "moe_intermediate_size", "shared_expert_intermediate_size", "num_experts", "num_local_experts")  # fmt: skip
COMPLETE = ("qwen3", "gpt-oss", "gemma3")


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Finding the pre-tokenizer takes longer than all the rest, and threads wait for each other in tiny products."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tokenizer")
    hf_tiny.write_tokenizer(folder)
    found = open_checkpoint.tokenizer_metadata(folder, {"vocab_size": hf_tiny.N_VOCAB})
    monkeypatch.setattr(open_checkpoint, "tokenizer_metadata", lambda directory, config: found)
    yield
    torch.set_num_threads(n_threads)


def read_keys(name: str) -> list[str]:
    """The keys of config.json that transformers' classes of the model and of its config read."""
    cls = getattr(transformers, hf_tiny.TINY[name][0])
    source = inspect.getsource(importlib.import_module(cls.__module__)) + inspect.getsource(cls.config_class)
    keys = set(re.findall(r"(?:config|self)\.([a-z_]+)\b", source)) & set(cls.config_class().to_dict())
    return sorted(keys - {"rope_parameters", "text_config", "vision_config"} - set(known._HARMLESS))


def changes(name: str) -> Iterator[dict[str, Any]]:
    """Values of config.json to try, one key at a time, then those that go together."""
    config = hf_tiny._model(name, ()).config
    for key in read_keys(name):
        value = getattr(config, key)
        if key in SIZES and name not in COMPLETE:
            continue
        if key in OTHERS:
            yield from ({key: other} for other in OTHERS[key] if other != value)
        else:
            assert isinstance(value, bool | int | float), f"{key} is {value}: say in OTHERS what else it can be"
            yield {key: not value if isinstance(value, bool) else (value or 1) * 0.7}
    yield from (both for both in TOGETHER if both.keys() <= set(read_keys(name)))
    for rope in (*ROTATIONS, *(MORE_ROTATIONS if name in COMPLETE else ())):
        nested = {"full_attention": dict(rope), "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
        yield {"rope_parameters": nested if name == "gemma3" else dict(rope)}
    if name == "gemma3":
        scaled = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
        yield {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": scaled}}


def ours(folder: Path) -> NDArray[np.float64]:
    with open_checkpoint.open_checkpoint(folder) as file:
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
        decoder = Decoder(config, file.tensors, [NumpyBackend(np.float64)] * config.n_layer, 64)
        return np.concatenate([block.copy() for block in decoder.forward(IDS, len(IDS))])


def names_in(changed: Mapping[str, Any]) -> Iterator[str]:
    for key, value in changed.items():
        yield key
        if isinstance(value, dict):
            yield from names_in(value)


def outcome(folder: Path, expected: NDArray[np.float32], changed: Mapping[str, Any]) -> str:
    """ "": right, or the converter names what it does not carry over. Otherwise what is wrong."""
    names = set(names_in(changed))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            logits = ours(folder)
        except GgufRunError as error:
            return "" if any(name in str(error) for name in names) else f"{error}"
    difference = np.sqrt(np.mean((logits - expected) ** 2) / np.mean(expected**2))
    said = any(name in str(warning.message) for warning in told for name in names)
    return "" if difference < 1e-5 or said else f"relative difference {difference:.1e}"


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", FAMILIES)
def test_no_key_is_dropped_in_silence(name: str, tmp_path: Path) -> None:
    plain = hf_tiny.logits(hf_tiny.make(name, tmp_path / "plain"), IDS)
    wrong, n_tried, n_other = [], 0, 0
    for i, changed in enumerate(changes(name)):
        folder = tmp_path / str(i)
        try:
            expected = hf_tiny.logits(hf_tiny.make(name, folder, **changed), IDS)
        except Exception:  # transformers does not run this: nothing to compare with
            continue
        n_tried += 1
        n_other += expected.shape != plain.shape or np.abs(expected - plain).max() > 1e-6
        if problem := outcome(folder, expected, changed):
            wrong.append(f"{changed}: {problem}")
    assert not wrong, "\n".join(wrong)
    assert n_tried >= 10
    assert n_other >= 8  # the test would find what is dropped


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_key_that_is_left_out_has_transformers_default(name: str, tmp_path: Path) -> None:
    hf_tiny.make(name, tmp_path)
    path = tmp_path / "config.json"
    text = path.read_text()
    layout, _ = layout_of(Config(path, json.loads(text)))
    sizes = {"vocab_size", "head_dim", "num_attention_heads", "num_key_value_heads"}
    more = {"rope_parameters", "tie_word_embeddings", "rms_norm_eps", "layer_norm_eps", "norm_epsilon"}
    flags = {"attention_bias", "mlp_bias", "use_qkv_bias", "use_bias", "qk_layernorm", "use_parallel_residual"}
    for key in sorted((layout.defaults.keys() | ((more | flags) & json.loads(text).keys())) - sizes):
        values = json.loads(text)
        values.pop(key, None)
        for part in ("rope_parameters", *(("rope_parameters", "full_attention") if name == "gemma3" else ())):
            place = values.get("rope_parameters", {}) if part == "full_attention" else values
            if key.startswith("rope") and isinstance(place.get(part), dict):
                place[part].pop(key, None)
        path.write_text(json.dumps(values))
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
        said = {} if key in layout.defaults.keys() - {"tie_word_embeddings"} else {key: None}
        assert not outcome(tmp_path, hf_tiny.logits(model.eval(), IDS), said), key


def test_unknown_keys_are_told_and_harmless_ones_are_not(tmp_path: Path) -> None:
    hf_tiny.plain_llama(
        tmp_path, _name_or_path="x", use_cache=False, attention_dropout=0.1, some_flag=False, other=None
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_checkpoint.open_checkpoint(tmp_path)
    hf_tiny.plain_llama(tmp_path, use_new_thing=True, rope_scaling={"rope_type": "linear", "factor": 2, "turns": 3})
    with pytest.warns(UserWarning, match=r"not know .rope_parameters\.turns., .use_new_thing.: if that changes"):
        open_checkpoint.open_checkpoint(tmp_path)


# Keys of published files that transformers does not read, or whose value is built in.
@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("starcoder2", {"attention_softmax_in_fp32": True, "scale_attention_softmax_in_fp32": True,
                        "scale_attn_weights": True, "layer_norm_epsilon": 1e-5}),
        ("qwen3moe", {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0}),
        ("gemma2", {"sliding_window_size": 4096}),
        ("gemma3", {"image_token_id": 7, "boi_token_id": 8, "eoi_token_index": 9, "video_token_id": 10}),
        ("llama", {"num_labels": 2, "use_flash_attention_2": True, "decoder_start_token_id": 5}),
        ("stablelm", {"num_heads": 6, "rotary_scaling_factor": 1.0}),
    ],
)  # fmt: skip
def test_keys_of_published_files_give_no_warning(name: str, extra: dict[str, Any], tmp_path: Path) -> None:
    hf_tiny.make(name, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_checkpoint.open_checkpoint(tmp_path)


def test_the_epsilon_of_published_files(tmp_path: Path) -> None:
    """OLMoE's files leave it out, StableLM's first ones have another name; no other file lacks it."""
    path = tmp_path / "config.json"
    for name, old, new, key in (
        ("olmoe", "rms_norm_eps", {}, "olmoe.attention.layer_norm_rms_epsilon"),
        ("stablelm", "layer_norm_eps", {"norm_eps": 1e-5}, "stablelm.attention.layer_norm_epsilon"),
    ):
        hf_tiny.make(name, tmp_path)
        values = json.loads(path.read_text())
        del values[old]
        path.write_text(json.dumps(values | new))
        assert open_checkpoint.open_checkpoint(tmp_path).metadata[key] == pytest.approx(1e-5)
    hf_tiny.plain_llama(tmp_path, rms_norm_eps=None)
    with pytest.raises(GgufRunError, match=r"config\.json: rms_norm_eps is missing, must be a number"):
        open_checkpoint.open_checkpoint(tmp_path)


@pytest.mark.parametrize("extra", [{"scale_attn_weights": False}, {"rotary_scaling_factor": 2.0}])
def test_values_that_no_file_can_tell(extra: dict[str, Any], tmp_path: Path) -> None:
    hf_tiny.plain_llama(tmp_path, **extra)
    with pytest.raises(GgufRunError, match=next(iter(extra))):
        open_checkpoint.open_checkpoint(tmp_path)


def test_flags_that_the_tensors_contradict(tmp_path: Path) -> None:
    hf_tiny.plain_llama(tmp_path, attention_bias=True)
    with pytest.raises(GgufRunError, match=r"attention_bias is True, but there is no tensor for blk\.0\.attn_q\.bias"):
        open_checkpoint.open_checkpoint(tmp_path)
