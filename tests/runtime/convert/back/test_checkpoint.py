"""gguf-convert --to-hf: what it writes is the checkpoint that the GGUF file came from, to transformers and to us."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_tiny
import hftokenizers
import numpy as np
import pytest
import real
from click.testing import CliRunner
from hftokenizers import KINDS, texts
from tinyvocab import bpe_metadata
from tokenizers import Tokenizer as HfTokenizer

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.safetensors import read_safetensors
from gguf_run.runtime.cli.convert import main
from gguf_run.runtime.convert.back.checkpoint import export_hf
from gguf_run.runtime.convert.back.tokenizer import tokenizer_files
from gguf_run.runtime.convert.open_checkpoint import open_checkpoint
from gguf_run.runtime.convert.vocabulary.metadata import tokenizer_metadata
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

IDS = [(7 * i * i + 3 * i + 2) % 300 for i in range(24)]
SMOLLM2_KEYS = (
    "model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id", "unknown_token_id",
    "padding_token_id", "add_bos_token",
)  # fmt: skip
NOT_IN_TRANSFORMERS = ("internlm2", "deepseek")


_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
_WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
OTHER_VALUES = [
    ("mistral", {"sliding_window": 8}),
    ("mixtral", {"sliding_window": 8}),
    ("qwen2", _WINDOW),
    ("qwen2moe", {**_WINDOW, "norm_topk_prob": True}),
    ("qwen3moe", {**_WINDOW, "norm_topk_prob": False}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 7}),
    ("qwen3", {"rope_parameters": {**_YARN, "attention_factor": 1.5, "truncate": False}}),
    ("phi3-longrope", {"rope_parameters": {**hf_tiny._LONGROPE, "attention_factor": 1.5}}),
]


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize(("name", "config"), [*((name, {}) for name in hf_tiny.TINY), *OTHER_VALUES])
def test_there_and_back(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    """The GGUF file of the export is the one that was exported, and transformers computes the very same logits."""
    transformers = pytest.importorskip("transformers")
    model = hf_tiny.make(name, tmp_path / "a", **config)
    with open_checkpoint(tmp_path / "a", name="x") as file:
        export_hf(file, tmp_path / "b")
        with open_checkpoint(tmp_path / "b", name="x") as again:
            for key in file.metadata:
                if not key.startswith("general."):
                    assert str(again.metadata.get(key)) == str(file.metadata[key]), key
            assert file.tensors.keys() == again.tensors.keys()
            for key, tensor in file.tensors.items():
                assert np.array_equal(tensor.blocks(), again.tensors[key].blocks()), key
    if name not in NOT_IN_TRANSFORMERS:
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "b", attn_implementation="eager", output_loading_info=True
        )
        assert not any(info.values()), info
        again_logits, logits = hf_tiny.logits(loaded.eval(), IDS), hf_tiny.logits(model, IDS)
        # A factor of attention is f32 in a GGUF file.
        assert np.allclose(again_logits, logits, rtol=0, atol=1e-4 if config else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_give_the_same_ids(kind: str, tmp_path: Path) -> None:
    original = hftokenizers.write(tmp_path, kind, chat_template="x")
    metadata = tokenizer_metadata(tmp_path, {"vocab_size": original.get_vocab_size() + 2})
    files = tokenizer_files(metadata)
    exported = HfTokenizer.from_str(json.dumps(files["tokenizer.json"]))
    for text in texts(60, seed=11, special=hftokenizers.special_names(original)):
        assert exported.encode(text).ids == original.encode(text).ids, text
    assert files["tokenizer_config.json"]["chat_template"] == "x"


def test_a_real_tokenizer(tmp_path: Path) -> None:
    with GGUFFile.open(real.smollm2()) as file:
        assert export_hf(file, tmp_path / "out", vocab_only=True) == ["tokenizer.json", "tokenizer_config.json"]
        tokenizer = Tokenizer.from_metadata(file.metadata)
        metadata = tokenizer_metadata(tmp_path / "out", {"vocab_size": tokenizer.n_vocab})
        for key in SMOLLM2_KEYS:
            assert np.array_equal(metadata[f"tokenizer.ggml.{key}"], file.metadata[f"tokenizer.ggml.{key}"]), key
        assert metadata["tokenizer.chat_template"] == file.metadata["tokenizer.chat_template"]
    exported = HfTokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in texts(200, seed=12, special=("<|im_start|>", "<|im_end|>", "<repo_name>")):
        assert exported.encode(text).ids == tokenizer.encode(text), text


def test_named_templates_and_several_ends() -> None:
    metadata = bpe_metadata(special={"<x>": 3, "<y>": 3}, eos_token_id=256, eot_token_id=257) | {
        "tokenizer.chat_template": "A", "tokenizer.chat_template.rag": "B", "tokenizer.chat_templates": ["rag"],
    }  # fmt: skip
    from gguf_run.runtime.convert.back.config import generation_config

    assert generation_config(metadata) == {"eos_token_id": [256, 257]}
    template = tokenizer_files(metadata)["tokenizer_config.json"]["chat_template"]
    assert template == [{"name": "default", "template": "A"}, {"name": "rag", "template": "B"}]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint."""
    pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf_tiny.make("llama", directory)
    return directory


def test_shards_and_types(llama: Path, tmp_path: Path) -> None:
    with open_checkpoint(llama) as file:
        names = export_hf(file, tmp_path / "whole", "F32")
        sharded = export_hf(file, tmp_path / "parts", "BF16", shard_size=40_000)
    assert names == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert set(shards) < set(sharded)
    whole = read_safetensors(tmp_path / "whole" / "model.safetensors").arrays
    n_bytes = 0
    for shard in shards:
        for name, tensor in read_safetensors(tmp_path / "parts" / shard).arrays.items():
            assert index["weight_map"][name] == shard
            assert (tensor.dtype, tensor.shape) == ("BF16", whole[name].shape)
            exact, bits = whole[name].array(), tensor.array().astype(np.uint32) << 16
            assert np.abs(bits.view(np.float32) - exact).max() <= np.abs(exact).max() / 256
            n_bytes += tensor.data.nbytes
    assert index["metadata"]["total_size"] == n_bytes
    assert json.loads((tmp_path / "parts" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_quantized_files_become_f16(llama: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(llama), "-o", str(tmp_path / "q.gguf"), "--type", "Q8_0"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(main, [str(tmp_path / "q.gguf"), "-o", str(tmp_path / "out"), "--to-hf"])
    assert result.exit_code == 0, result.output
    assert "config.json, generation_config.json, model.safetensors, tokenizer.json" in result.output
    stored = read_safetensors(tmp_path / "out" / "model.safetensors").arrays
    assert {tensor.dtype for tensor in stored.values()} == {"F16"}
    exact = read_safetensors(llama / "model.safetensors").arrays["model.embed_tokens.weight"].array()
    assert np.abs(stored["model.embed_tokens.weight"].array() - exact).max() < np.abs(exact).max() / 100


def test_a_folder_that_is_there(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with open_checkpoint(llama) as file:
        export_hf(file, tmp_path / "empty")
        for directory in (tmp_path / "full", tmp_path / "full" / "x"):
            with pytest.raises(GgufRunError, match="is there already: name a new folder"):
                export_hf(file, directory)
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "full"}


def broken(llama: Path, **changes: Any) -> GGUFFile:
    """The checkpoint as a file with other metadata (None: without) or other names of tensors."""
    file = open_checkpoint(llama)
    metadata = dict(file.metadata) | {key: value for key, value in changes.items() if "." in key and value is not None}
    metadata = {key: value for key, value in metadata.items() if key not in changes or changes[key] is not None}
    tensors = {changes.get(name, name): replace(t, name=changes.get(name, name)) for name, t in file.tensors.items()}
    return GGUFFile.of(llama, metadata, tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "mamba"}, 'architecture "mamba" cannot be exported; these can: arcee,'),
        ({"general.architecture": None}, "cannot be exported"),
        ({"token_embd.weight": "x.weight"}, "there is no matrix token_embd.weight"),
        ({"blk.1.attn_v.weight": "blk.1.attn_w.weight"}, r'tensor "blk.1.attn_w.weight" \(1 such\) has no place in a'),
        ({"llama.block_count": None}, "num_hidden_layers is missing"),
        ({"llama.attention.head_count": [6, 6]}, "head_count is no single number"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model is missing"),
    ],
)  # fmt: skip
def test_what_a_checkpoint_has_no_place_for(changes: dict[str, Any], message: str, llama: Path, tmp_path: Path) -> None:
    with broken(llama, **changes) as file, pytest.raises(GgufRunError, match=message) as raised:
        export_hf(file, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_values_beyond_f16(llama: Path, tmp_path: Path) -> None:
    with open_checkpoint(llama) as file:
        tensor = file.tensors["blk.0.ffn_up.weight"]
        big = replace(tensor, read=lambda first, end: np.full((end - first, tensor.ne[0]), 1e5, np.float32))  # type: ignore[call-arg]
        wrong = GGUFFile.of(llama, dict(file.metadata), dict(file.tensors) | {tensor.name: big})
        with pytest.raises(GgufRunError, match=r"up_proj\.weight has values beyond"):
            export_hf(wrong, tmp_path / "out", "F16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--to-hf needs -o FOLDER"),
        (["-o", "out", "--name", "x"], "--to-hf needs -o FOLDER, and takes --type"),
        (["-o", "out", "--type", "Q4_0"], "--type Q4_0: with --to-hf auto, BF16, F16, F32 are allowed"),
    ],
)
def test_options(options: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.touch()
    result = CliRunner().invoke(main, [str(path), "--to-hf", *options])
    assert result.exit_code == 2
    assert message in result.output
