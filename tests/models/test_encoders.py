"""Encoders: hidden states of tiny random checkpoints are those of transformers, and embeddings follow from them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_tiny
import numpy as np
import pytest
import tiny
from cpu_ops import cpu, error, f32_tensor
from numpy_backend import NumpyBackend
from quantpack import write_safetensors
from tiny import IDS

from gguf_run.formats.errors import FormatError, GgufRunError, UnsupportedError
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.embedder import Embedder
from gguf_run.models.op_costs import OPERATIONS, Sizes, op_costs

pytest.importorskip("transformers")

S, F = "sliding_attention", "full_attention"
BERT = {"hidden_size": 96, "num_attention_heads": 6, "pad_token_id": 0, "tie_word_embeddings": True}
# name -> (transformers' model class, config beyond hf_tiny._COMMON)
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", BERT),
    "nomic-bert": ("NomicBertModel", BERT),
    "gemma-embedding": (
        "Gemma3TextModel",
        {"hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
         "num_hidden_layers": 3, "layer_types": [S, S, F], "sliding_window": 11, "query_pre_attn_scalar": 16,
         "use_bidirectional_attention": True, "tie_word_embeddings": True},
    ),
}  # fmt: skip


def states(model: Any, ids: list[int]) -> np.ndarray:
    """transformers' hidden states f32[len(ids), n_embd], the last norm applied."""
    import torch

    with torch.no_grad():
        found: np.ndarray = model(torch.tensor([ids])).last_hidden_state[0].numpy()
    return found


def embedder(config: ModelConfig, tensors: Any, *backends: Any, n_ctx: int = 256, n_batch: int = 8) -> Embedder:
    kinds = [CacheType("f32", "f32")] * config.n_layer
    placed = [*backends[:-1], *[backends[-1]] * (config.n_layer - len(backends) + 1)]
    return Embedder(config, tensors, placed, n_ctx, n_batch, cache_types=kinds)


@pytest.mark.parametrize("name", TINY)
def test_hidden_states_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model, found = tiny.make(tmp_path, *TINY[name]), {}
    with tiny.opened(tmp_path) as (config, tensors):
        for label, backends in {
            "float64": (NumpyBackend(np.float64),), "threads": (cpu(3),), "two backends": (cpu(1), cpu(2)),
        }.items():  # fmt: skip
            made = embedder(config, tensors, *backends)
            for n in (90, 33, 2, 1):  # more than n_batch, which an encoder does not keep to
                found[label, n] = error(made.hidden(IDS[:n], n), states(model, IDS[:n]))
    assert max(found.values()) < 1e-4, found


def test_a_causal_model_makes_embeddings_in_pieces(tmp_path: Path) -> None:
    name, own = hf_tiny.TINY["qwen3"]
    expected = states(tiny.make(tmp_path, name, own).model, IDS)
    with tiny.opened(tmp_path, **{"qwen3.pooling_type": 3}) as (config, tensors):
        assert config.pooling is not None
        assert (config.pooling.type, config.pooling.is_only) == ("last", False)
        rest = {key: tensor for key, tensor in tensors.items() if key != "output.weight"}  # not needed
        made = embedder(config, rest, cpu(2))
        assert error(made.hidden(IDS, 90), expected) < 1e-4
        for pooling, row in (("last", expected[-1]), ("cls", expected[0]), ("mean", expected.mean(axis=0))):
            assert error(made.embedding(IDS, pooling), row) < 1e-4
            assert (error(made.embedding(IDS[:5], pooling), row) > 1e-2) == (pooling != "cls")
        with pytest.raises(
            GgufRunError, match=r"^this qwen3 model is loaded to make embeddings, no text: use .* without embed=True$"
        ):
            made.forward(IDS)


def test_matrices_behind_the_pooling(tmp_path: Path) -> None:
    """Of a folder for sentence-transformers, as EmbeddingGemma has it."""
    model = tiny.make(tmp_path, *TINY["gemma-embedding"])
    rng, types = np.random.default_rng(2), "sentence_transformers.models"
    first, second, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((40, 72), (24, 40), (24,)))
    modules = [{"path": "", "type": f"{types}.Transformer"}, {"path": "1_Pooling", "type": f"{types}.Pooling"}]
    modules += [{"path": f"{i}_Dense", "type": f"{types}.Dense"} for i in (2, 3)]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    for module in modules[1:]:
        (tmp_path / module["path"]).mkdir()
        (tmp_path / module["path"] / "config.json").write_text(
            json.dumps({"pooling_mode_mean_tokens": True, "activation_function": "torch.nn.modules.linear.Identity"})
        )
    write_safetensors(tmp_path / "2_Dense/model.safetensors", {"linear.weight": ("F32", first)})
    rest = {"linear.weight": ("F32", second), "linear.bias": ("F32", bias)}
    write_safetensors(tmp_path / "3_Dense/model.safetensors", rest)
    with tiny.opened(tmp_path) as (config, tensors):
        assert config.pooling is not None
        assert config.pooling.type == "mean"
        found = embedder(config, tensors, cpu(2)).embedding(IDS, "mean")
        assert error(found, second @ (first @ states(model, IDS).mean(axis=0)) + bias) < 1e-4
        with pytest.raises(FormatError, match=r"dense_3.weight has 40 x 24 values, must have 72 x 24"):
            ModelConfig.from_metadata(
                {"general.architecture": "gemma-embedding", **metadata_of(tmp_path)},
                {name: tensor for name, tensor in tensors.items() if name != "dense_2.weight"},
            )
    for text in ("1", '[{"path": "../x", "type": "a.Pooling"}]', '[{"path": 1, "type": "a.Pooling"}]', "[1]", "{"):
        (tmp_path / "modules.json").write_text(text)
        with pytest.raises(FormatError, match=r"modules.json: must be a list of modules"), tiny.opened(tmp_path):
            pass
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(UnsupportedError, match=r"the pooling must be one of mean_tokens, "), tiny.opened(tmp_path):
        pass


def metadata_of(folder: Path) -> dict[str, Any]:
    from gguf_run.runtime.convert.open_checkpoint import open_checkpoint

    with open_checkpoint(folder) as file:
        return dict(file.metadata)


def test_scores(tmp_path: Path) -> None:
    name, own = hf_tiny.TINY["qwen3"]
    model = tiny.make(tmp_path, name, own)
    yes, no = hf_tiny.logits(model, IDS)[-1][[7, 9]].astype(float)
    with tiny.opened(tmp_path) as (_, tensors):
        rows = model.lm_head.weight[[7, 9]].detach().numpy()
        head = {"cls.output.weight": replace(f32_tensor(rows), name="cls.output.weight")}
        config = ModelConfig.from_metadata({**metadata_of(tmp_path), "qwen3.pooling_type": 4}, {**tensors, **head})
        assert config.pooling is not None
        assert config.pooling.is_only
        made = embedder(config, {**tensors, **head}, cpu(2))
        assert made.score(IDS) == pytest.approx(1 / (1 + np.exp(no - yes)), abs=1e-5)


def test_what_an_encoder_refuses(tmp_path: Path) -> None:
    tiny.make(tmp_path, *TINY["bert"])
    with tiny.opened(tmp_path) as (config, tensors):
        made = embedder(config, tensors, cpu(2), n_ctx=1000)
        assert made.n_ctx == config.n_ctx_train == 256
        for call in (lambda: made.forward([1]), lambda: made.top({0: [1]}), lambda: made.step({0: [1]})):
            with pytest.raises(
                GgufRunError, match=r"^this bert model is loaded to make embeddings, no text: use Model.embed or rank"
            ):
                call()
        with pytest.raises(GgufRunError, match="257 more do not fit into 256"):
            made.hidden([1] * 257)
        with pytest.raises(GgufRunError, match="token 1 has the id 300"):
            made.hidden([1, 300])
        assert made.hidden([1, 2]).shape == (1, 96)  # and it goes on
        for key in ("position_embd.weight", "token_embd_norm.bias", "blk.1.layer_output_norm.weight"):
            rest = {name: tensor for name, tensor in tensors.items() if name != key}
            with pytest.raises(FormatError, match=f"tensor {key} is missing"):
                ModelConfig.from_metadata(metadata_of(tmp_path), rest)
        short = {**tensors, "position_embd.weight": f32_tensor(np.zeros((9, 96)))}
        with pytest.raises(FormatError, match=r"position_embd.weight has 96 x 9 values, must have 96 x 256"):
            ModelConfig.from_metadata(metadata_of(tmp_path), short)
        costs = op_costs(config, tensors, [CacheType()] * 2, 64, Sizes(lambda *_: 1, lambda *_: 1))
        assert {cost.op for cost in costs} <= {op.__name__ for op in OPERATIONS}


def test_recurrent_layers_see_no_later_tokens(tmp_path: Path) -> None:
    lfm2 = {
        **hf_tiny._FREE, "layer_types": ["conv", F], "conv_L_cache": 3, "intermediate_size": 104, "norm_eps": 1e-5,
        "block_auto_adjust_ff_dim": False, "head_dim": 12,
    }  # fmt: skip
    tiny.make(tmp_path, "Lfm2ForCausalLM", lfm2)
    with (
        pytest.raises(UnsupportedError, match=r"^lfm2.attention.causal is false"),
        tiny.opened(tmp_path, **{"lfm2.attention.causal": False}),
    ):
        pass
