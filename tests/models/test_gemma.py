"""Gemma 4 and Gemma 3n: logits of tiny checkpoints are those of transformers."""

from pathlib import Path
from typing import Any

import hf_tiny
import numpy as np
import pytest
import tiny
from cpu_ops import cpu, error
from numpy_backend import NumpyBackend
from tiny import IDS

from gguf_run.formats.errors import GgufRunError
from gguf_run.models.backend import CacheType
from gguf_run.models.decoder import Decoder
from gguf_run.models.ops import Attend, MatmulGated
from gguf_run.runtime.convert.open_checkpoint import open_checkpoint

pytest.importorskip("transformers")

S, F = "sliding_attention", "full_attention"
GEMMA4 = {
    "hidden_size": 72, "num_attention_heads": 4, "head_dim": 16, "global_head_dim": 32, "sliding_window": 8,
    "final_logit_softcapping": 30.0, "tie_word_embeddings": True,
    "rope_parameters": {
        F: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        S: {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip
# A second kind of head in layers without a window, whose values are made of keys.
OTHER_HEADS = {"num_global_key_value_heads": 1, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0}
EXPERTS = {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 40}
# name -> (transformers' model class, config beyond hf_tiny._COMMON)
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4-e": (
        "Gemma4ForCausalLM",
        {**GEMMA4, "num_hidden_layers": 6, "layer_types": [S, F] * 3, "num_key_value_heads": 1,
         "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 24,
         "vocab_size_per_layer_input": 300},
    ),
    "gemma4-31": (
        "Gemma4ForCausalLM",
        {**GEMMA4, **OTHER_HEADS, "num_hidden_layers": 3, "layer_types": [S, S, F], "num_key_value_heads": 4,
         "num_global_key_value_heads": 2},
    ),
    "gemma4-26": (
        "Gemma4ForCausalLM",
        {**GEMMA4, **OTHER_HEADS, **EXPERTS, "layer_types": [S, F], "num_key_value_heads": 2, "intermediate_size": 56},
    ),
    "gemma3n": (
        "Gemma3nForCausalLM",
        {"hidden_size": 72, "num_hidden_layers": 6, "layer_types": [S, F] * 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 24,
         "activation_sparsity_pattern": [0.95, 0.5, 0.0, 0.0, 0.0, 0.0], "vocab_size_per_layer_input": 300,
         "laurel_rank": 8, "sliding_window": 8, "final_logit_softcapping": 30.0, "tie_word_embeddings": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    tiny.check(tmp_path, *TINY[name])


def decoder_of(folder: Path, backend: Any, cache: str, n_seq: int = 1) -> Decoder:
    with tiny.opened(folder) as (config, tensors):
        kinds = [CacheType(cache, cache)] * config.n_layer
        return Decoder(config, tensors, [backend] * config.n_layer, 256, 96, 8, n_seq, kinds)


def last(decoder: Decoder, ids: list[int], seq: int = 0) -> np.ndarray:
    return np.concatenate([block.copy() for block in decoder.forward(ids, 1, seq)])


def test_shared_caches(tmp_path: Path) -> None:
    """They are held once, and serve several sequences, sessions and shifted contexts, quantized too."""
    tiny.make(tmp_path, *TINY["gemma4-e"])
    decoder = decoder_of(tmp_path, cpu(2), "q8_0", n_seq=3)
    for seq, ids in ((0, IDS), (1, IDS[5:45])):
        last(decoder, ids, seq)
    steps = {0: [7], 1: [8, 9], 2: [1, 2, 3]}
    rows = decoder.step(steps).copy()
    alone = [last(decoder_of(tmp_path, cpu(2), "q8_0"), ids) for ids in ([*IDS, 7], [*IDS[5:45], 8, 9], [1, 2, 3])]
    assert error(rows, np.concatenate(alone)) < 1e-5
    parts = list(decoder.cache.export(0))
    assert {il for il, _, _ in parts} == {0, 1, 2, 3}  # layers 4 and 5 read those of 2 and 3
    copy = decoder_of(tmp_path, cpu(2), "q8_0")
    copy.cache.load(decoder.cache.n_past(0), parts)
    assert (last(copy, [4, 5]) == last(decoder, [4, 5])).all()
    shifted = []
    for backend in (cpu(2), NumpyBackend(np.float64)):
        one = decoder_of(tmp_path, backend, "f32")
        last(one, IDS)
        assert one.cache.shift(32, 32) == len(IDS) - 32
        shifted.append(last(one, [1, 2, 3]))
    assert error(*shifted) < 1e-4


def test_layers_behind_the_last_cache_see_only_the_wanted_rows(tmp_path: Path) -> None:
    tiny.make(tmp_path, *TINY["gemma4-e"])
    with tiny.opened(tmp_path) as (config, tensors):
        backend = NumpyBackend(np.float64)
        decoder = Decoder(config, tensors, [backend] * config.n_layer, 64)
        program: Any = decoder._program
        assert [op.k is None for op in program.parts[0] if isinstance(op, Attend)] == [False] * 4
        assert [op.k is None for op in program.after if isinstance(op, Attend)] == [True] * 2
        assert sum(isinstance(op, MatmulGated) for op in program.after) == 3  # of the last layer with a cache, too


def test_parts_on_several_backends(tmp_path: Path) -> None:
    """What passes from one to the next: streams, embeddings for layers, what experts and the dense ffn have made."""
    for name, cut in (("gemma4-26", 1), ("gemma3n", 2)):
        model = tiny.make(tmp_path / name, *TINY[name])
        with tiny.opened(tmp_path / name) as (config, tensors):
            own, other = cpu(2), cpu(1)
            backends = [other] * cut + [own] * (config.n_layer - cut)
            kinds, experts = [CacheType("f32", "f32")] * config.n_layer, [own] * config.n_layer
            decoder = Decoder(config, tensors, backends, 64, 16, cache_types=kinds, embedding=own, experts=experts)
            found = np.concatenate([block.copy() for block in decoder.forward(IDS[:40], 40)])
        assert error(found, hf_tiny.logits(model, IDS[:40])) < 1e-4


def test_a_table_with_fewer_rows_than_tokens(tmp_path: Path) -> None:
    tiny.make(tmp_path, *TINY["gemma3n"])
    with open_checkpoint(tmp_path) as whole:
        rows = whole.tensors["per_layer_token_embd.weight"].blocks()
    tiny.make(tmp_path, TINY["gemma3n"][0], {**TINY["gemma3n"][1], "vocab_size_per_layer_input": 280})
    with open_checkpoint(tmp_path) as file:
        blocks = file.tensors["per_layer_token_embd.weight"].blocks()
    assert blocks.shape == rows.shape
    assert blocks[:280].any(axis=1).all()
    assert not blocks[280:].any()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma4-e", {"gemma4.attention.shared_kv_layers": 5}, r"shared_kv_layers is 5, must be so few"),
        ("gemma4-e", {"gemma4.attention.sliding_window_pattern": None}, r"sliding_window_pattern is missing"),
        ("gemma4-e", {"gemma4.attention.value_length_swa": 8}, r"value_length_swa is 8, must be the same"),
        ("gemma4-e", {"gemma4.embedding_length_per_layer_input": 0}, r"tensor '?per_layer_token_embd.weight"),
        ("gemma4-26", {"gemma4.expert_feed_forward_length": 41}, r"tensor blk.0.ffn_gate_up_exps.weight has 72 x 80"),
        ("gemma3n", {"gemma3n.altup.active_idx": 1}, r"altup.active_idx is 1, must be"),
        ("gemma3n", {"gemma3n.activation_sparsity_scale": np.zeros(3, np.float32)}, r"must be 6 numbers"),
    ],
)
def test_wrong_keys(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny.make(tmp_path, *TINY[name])
    with pytest.raises(GgufRunError, match=message), tiny.opened(tmp_path, **changes):
        pass
