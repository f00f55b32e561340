"""Adapters of low rank: logits are those of a model with the product of both halves in its weights."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import IDS, decoder, logits, merged, random_pairs, write_adapter
from cpu_ops import cpu, error
from numpy_backend import NumpyBackend
from tiny import make, opened
from tinymodel import ALL_BIASES, TINY_GEMMA3, WIDE_LLAMA, Tiny, tiny_moe, write_tiny

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.errors import FormatError, GgufRunError, OptionError, UnsupportedError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.models.adapted_step import Adapters
from gguf_run.models.adapter_scales import AdapterScales
from gguf_run.models.adapters import read_adapter
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder
from gguf_run.runtime.convert.stored.sources import computed

ALL = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), 8)
UNEVEN = {"attn_q": 1, "attn_v": 5, "ffn_up": 17, "ffn_down": 3}  # k and gate have none
LLAMA = Tiny(biases=ALL_BIASES, tied=False)


def backends() -> list[Any]:
    return [NumpyBackend(np.float64), cpu(2)]


@pytest.mark.parametrize("tiny", [LLAMA, TINY_GEMMA3], ids=["llama", "gemma3"])
@pytest.mark.parametrize(("ranks", "type"), [(ALL, "F16"), (UNEVEN, "F32"), (UNEVEN, "BF16")])
def test_logits_are_those_of_merged_weights(tiny: Tiny, ranks: dict[str, int], type: str, tmp_path: Path) -> None:
    pairs, others = random_pairs(tiny, ranks, 1, type), random_pairs(tiny, ALL, 2)
    one = write_adapter(tmp_path / "one.gguf", pairs, tiny.arch, type)
    two = write_adapter(tmp_path / "two.gguf", others, tiny.arch)
    write_tiny(tmp_path / "base.gguf", tiny)
    write_tiny(tmp_path / "merged.gguf", replace(tiny, tensors=merged(tiny, {0.5: pairs, -1.0: others})))
    expected = logits(decoder(tmp_path / "merged.gguf", NumpyBackend(np.float64)))
    base = logits(decoder(tmp_path / "base.gguf", NumpyBackend(np.float64)))
    assert error(base, expected) > 0.05
    both = [backends()[il % 2] for il in range(tiny.n_layer)]
    for backend in (*backends(), both):
        assert error(logits(decoder(tmp_path / "base.gguf", backend, [(one, 0.5), (two, -1.0)])), expected) < 1e-5


@pytest.mark.parametrize("i", [0, 1])
def test_sequences_use_different_adapters_side_by_side(i: int, tmp_path: Path) -> None:
    pairs = [random_pairs(LLAMA, ranks, seed) for seed, ranks in enumerate((ALL, UNEVEN))]
    files = [(write_adapter(tmp_path / f"{seed}.gguf", one), 1.0) for seed, one in enumerate(pairs)]
    write_tiny(tmp_path / "base.gguf", LLAMA)
    mixtures: list[dict[str, float]] = [{"0": 1.0}, {"1": -0.5}, {}, {"0": 0.25, "1": 2.0}]
    made = decoder(tmp_path / "base.gguf", backends()[i], files, n_seq=len(mixtures))
    assert made.adapters is not None
    for seq, mixture in enumerate(mixtures):
        made.adapters.scales.set(seq, mixture)
    texts = {seq: IDS[: 3 + seq] for seq in (2, 0, 3, 1)}
    steps = [made.step(texts).copy(), made.step(dict.fromkeys(texts, IDS[9:10])).copy()]
    for row, seq in enumerate(texts):
        added = {scale: pairs[int(name)] for name, scale in mixtures[seq].items()}
        write_tiny(tmp_path / "merged.gguf", replace(LLAMA, tensors=merged(LLAMA, added)))
        alone = decoder(tmp_path / "merged.gguf", NumpyBackend(np.float64))
        for step, ids in zip(steps, (texts[seq], IDS[9:10]), strict=True):
            assert error(step[row], alone.step({0: ids})[0]) < 1e-5


SCALED_TO_NOTHING = {
    "Q4_K": replace(WIDE_LLAMA, type="Q4_K", types={"attn_v": "Q6_K"}, biases=ALL_BIASES),
    "Q4_0": replace(WIDE_LLAMA, type="Q4_0", types={"ffn_up": "Q8_0"}, tied=False),
    "F16": replace(LLAMA, type="F16"),
    "gemma3": replace(TINY_GEMMA3, type="Q8_0"),
    "experts": tiny_moe(2, "Q8_0"),
}


@pytest.mark.parametrize("ranks", [ALL, UNEVEN, dict.fromkeys(("ffn_gate_shexp", "ffn_down_shexp", "output"), 4)])
@pytest.mark.parametrize("name", SCALED_TO_NOTHING)
def test_at_scale_0_all_bits_are_those_of_the_model(name: str, ranks: dict[str, int], tmp_path: Path) -> None:
    tiny = SCALED_TO_NOTHING[name]
    if not (pairs := random_pairs(tiny, ranks)):
        pytest.skip("the model has no such tensors")
    for a, _ in pairs.values():
        a *= 1e30  # the products are infinite or NaN
    path = write_adapter(tmp_path / "adapter.gguf", pairs, tiny.arch)
    write_tiny(tmp_path / "base.gguf", tiny)
    base, adapted = (decoder(tmp_path / "base.gguf", cpu(2), adapters) for adapters in ((), ((path, 0.0),)))
    np.testing.assert_array_equal(logits(base).view(np.uint32), logits(adapted).view(np.uint32))
    adapted.rewind(0)
    assert adapted.adapters is not None
    adapted.adapters.scales.set(0, {"adapter": 1e-30})
    assert (logits(adapted) != logits(base)).any()
    base.close()


@pytest.mark.parametrize("gated", [True, False], ids=["shared expert", "attention"])
def test_what_experts_share_is_adapted(gated: bool, tmp_path: Path) -> None:
    tiny = tiny_moe(2)
    names = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp") if gated else ("attn_k", "attn_output", "ffn_gate_inp")
    pairs = random_pairs(tiny, dict.fromkeys(names, 4))
    path = write_adapter(tmp_path / "adapter.gguf", pairs, tiny.arch)
    write_tiny(tmp_path / "base.gguf", tiny)
    tensors = {**tiny.tensors, **merged(tiny, {1.0: pairs})}
    write_tiny(tmp_path / "merged.gguf", replace(tiny, tensors=tensors))
    expected = logits(decoder(tmp_path / "merged.gguf", NumpyBackend(np.float64)))
    for backend in backends():
        assert error(logits(decoder(tmp_path / "base.gguf", backend, [(path, 1.0)])), expected) < 1e-5


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    tiny = tiny_moe(1)
    write_tiny(tmp_path / "base.gguf", tiny)
    base = GGUFFile.open(tmp_path / "base.gguf")
    name, good = "blk.0.attn_q.weight", random_pairs(tiny, {"attn_q": 4})["blk.0.attn_q.weight"]
    a, b = good
    nan, infinite = a.copy(), b.copy()
    nan[1, 2], infinite[0, 0] = np.nan, np.inf
    n_vocab = base.tensors["token_embd.weight"].ne[1]
    unread = "only matrices that are multiplied can be adapted"
    cases: list[tuple[dict[str, Any], dict[str, Any], type[GgufRunError], str]] = [
        ({name: (nan, b)}, {}, FormatError, "has values that are not finite"),
        ({name: (a, infinite)}, {}, FormatError, "has values that are not finite"),
        ({name: (a[:0], b[:, :0])}, {}, FormatError, "[64, 0] and [0, 64], must be [64, R] and [R, 64] with R"),
        ({name: (a[:3], b)}, {}, FormatError, "are [64, 3] and [4, 64], must be"),
        ({name: (a.T, b.T)}, {}, FormatError, "are [4, 64] and [64, 4], must be"),
        ({name: (a[:, :32], b)}, {}, FormatError, "are [32, 4] and"),
        ({name: (a,)}, {}, FormatError, 'are [64, 4] and missing, must'),
        ({"blk.1.attn_q.weight": good}, {}, FormatError, 'the model has no tensor "blk.1.attn_q.weight"'),
        ({"blk.0.attn_norm.weight": good}, {}, UnsupportedError, f'adapts "blk.0.attn_norm.weight": {unread}'),
        ({"blk.0.ffn_up_exps.weight": good}, {}, UnsupportedError, f'adapts "blk.0.ffn_up_exps.weight": {unread}'),
        ({"token_embd.weight": (a, b[:1].repeat(n_vocab, 0))}, {}, UnsupportedError, f'"token_embd.weight": {unread}'),
        ({name: good}, {"arch": "llama"}, FormatError, 'general.architecture is "llama", an adapter'),
        ({name: good}, {"general_type": "model"}, FormatError, 'general.type is "model", an adapter'),
        ({name: good}, {"adapter_type": "vera"}, FormatError, 'adapter.type is "vera", an adapter'),
        ({name: good}, {"alpha": float("nan")}, FormatError, 'adapter.lora.alpha is nan, must be a number from'),
        ({name: good}, {"alpha": 1e30}, FormatError, 'adapter.lora.alpha is 1'),
        ({}, {}, FormatError, "there are no tensors"),
    ]  # fmt: skip
    for i, (pairs, options, kind, words) in enumerate(cases):
        path = tmp_path / f"{i}.gguf"
        write_adapter(path, pairs, **{"arch": "qwen2moe", **options})
        with GGUFFile.open(path) as file, pytest.raises(kind, match=re.escape(words)):
            read_adapter("x", file, "qwen2moe", base.tensors)


def test_the_scale_of_a_file_without_alpha_is_1(tmp_path: Path) -> None:
    pairs = random_pairs(LLAMA, {"attn_q": 4})
    write_tiny(tmp_path / "base.gguf", LLAMA)
    path = write_adapter(tmp_path / "adapter.gguf", pairs, alpha=None)
    tensors = GGUFFile.open(tmp_path / "base.gguf").tensors
    assert {pair.factor for pair in read_adapter("x", GGUFFile.open(path), "llama", tensors).pairs.values()} == {1.0}


def test_a_matrix_that_is_used_in_another_form_is_refused(tmp_path: Path) -> None:
    """It would be left out silently."""
    write_tiny(tmp_path / "base.gguf", LLAMA)
    path = write_adapter(tmp_path / "adapter.gguf", random_pairs(LLAMA, {"attn_q": 2}))
    file = GGUFFile.open(tmp_path / "base.gguf")
    adapter = read_adapter("x", GGUFFile.open(path), "llama", file.tensors)
    unread = replace(adapter, pairs={"blk.0.taps.weight": adapter.pairs["blk.0.attn_q.weight"]})
    config = ModelConfig.from_metadata(file.metadata, file.tensors)
    with pytest.raises(OptionError, match=r'--lora x: adapts "blk.0.taps.weight": only matrices'):
        Decoder(config, file.tensors, [NumpyBackend()] * config.n_layer, 8, adapters=Adapters([(unread, 1.0)], 1))


def test_scales_that_are_not_allowed() -> None:
    scales = AdapterScales({"a": 1.0}, 2)
    for scale in (float("nan"), float("-inf"), 1e60, "1"):
        with pytest.raises(
            OptionError, match=r"adapter a has the scale .*; allowed are numbers from -1e\+06 to 1e\+06"
        ):
            scales.set(0, {"a": scale})
    with pytest.raises(OptionError, match=r"adapter b is not loaded \(--lora\): choose among a"):
        scales.set(0, {"b": 1.0})
    np.testing.assert_array_equal(scales.values, [[1], [1]])


QWEN3NEXT = {
    "hidden_size": 72, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "linear_conv_kernel_dim": 4, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
}  # fmt: skip


def test_rows_in_another_order(tmp_path: Path) -> None:
    """A step has the rows of q and its gate, and those of ssm_ba, in another order than the file."""
    pytest.importorskip("transformers")
    make(tmp_path / "base", "Qwen3NextForCausalLM", QWEN3NEXT)
    with opened(tmp_path / "base") as (config, tensors):
        pairs, changed, rng = {}, dict(tensors), np.random.default_rng(1)
        for full, tensor in tensors.items():
            if re.search(r"\.(attn_q|attn_qkv|attn_gate|attn_output|ssm_ba|ssm_in|ssm_out|ffn_up_shexp)\.", full):
                a, b = (
                    rng.standard_normal(ne).astype(np.float32) / 10 for ne in ((3, tensor.ne[0]), (tensor.ne[1], 3))
                )
                pairs[full] = a, b
                changed[full] = computed(full, dequantize(tensor.blocks(), tensor.type) + 4 * b @ a, tmp_path)
        assert {full.split(".")[-2] for full in pairs} > {"attn_q", "attn_qkv", "ssm_ba"}
        path = write_adapter(tmp_path / "adapter.gguf", pairs, config.arch.name)
        adapter = read_adapter("x", GGUFFile.open(path), config.arch.name, tensors)
        found = []
        for weights, adapters, backend in (
            (changed, None, NumpyBackend(np.float64)),
            (tensors, Adapters([(adapter, 1.0)], 1), NumpyBackend(np.float64)),
            (tensors, Adapters([(adapter, 1.0)], 1), cpu(2)),
        ):
            kinds = [CacheType("f32", "f32")] * config.n_layer
            one = Decoder(config, weights, [backend] * config.n_layer, 32, cache_types=kinds, adapters=adapters)
            found.append(np.concatenate([block.copy() for block in one.forward(IDS[:12], 12)]))
        assert error(found[1], found[0]) < 1e-5
        assert error(found[2], found[0]) < 1e-4
