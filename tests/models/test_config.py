"""ModelConfig: what it reads, and that nothing in a file makes it fail in any other way than by one clear line."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from tinymodel import TINY_GEMMA3, Tiny, metadata_of, tensor_shapes, tiny_moe

from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.errors import FormatError, GgufRunError, UnsupportedError
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.models.architectures import architecture
from gguf_run.models.config import ModelConfig
from gguf_run.models.keys import Keys
from gguf_run.models.routing import Mixture, read_experts

N_VOCAB = 50


def fake_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors without data. shapes: in numpy order."""
    f32 = type_by_name("F32")
    return {name: Tensor(name, shape[::-1], f32, 0, None) for name, shape in shapes.items()}  # type: ignore[arg-type]


def windows(config: ModelConfig) -> list[int]:
    return [layer.window for layer in config.layers]


def read(
    tiny: Tiny, metadata: Mapping[str, Any] | None = None, shapes: Mapping[str, tuple[int, ...] | None] | None = None
) -> ModelConfig:
    """metadata, shapes: additions to what `tiny` has, or None to leave out."""
    keys = {f"{tiny.arch}.{key}": value for key, value in (metadata_of(tiny) | dict(metadata or {})).items()}
    keys = {"general.architecture": tiny.arch} | {key: value for key, value in keys.items() if value is not None}
    all_shapes = tensor_shapes(tiny, N_VOCAB) | dict(shapes or {})
    return ModelConfig.from_metadata(keys, fake_tensors({n: s for n, s in all_shapes.items() if s is not None}))


def test_llama() -> None:
    config = read(Tiny())
    assert (config.n_layer, config.n_embd, config.n_head, config.n_head_kv, config.head_dim) == (2, 96, 4, 2, 32)
    assert (config.n_ff, config.n_rot, config.n_vocab, config.n_ctx_train) == (160, 32, N_VOCAB, 128)
    assert (config.n_embd_q, config.n_embd_kv, config.embd_scale) == (128, 64, 1)
    assert config.attention_scale == pytest.approx(1 / math.sqrt(32))
    assert [layer.window for layer in config.layers] == [0, 0]
    assert config.attention(1).window == 0
    assert config.rope_scaling.factor == 1


def test_defaults() -> None:
    left_out = ("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.freq_base")
    tiny = Tiny(n_head=3, n_head_kv=3, head_dim=32)
    config = read(tiny, dict.fromkeys(left_out))
    assert (config.n_head_kv, config.head_dim, config.n_rot, config.rope_freq_base) == (3, 32, 32, 1e4)


def test_a_sliding_window_without_pattern_is_that_of_all_layers() -> None:
    assert windows(read(Tiny(), {"attention.sliding_window": 16})) == [16, 16]
    assert windows(read(Tiny(), {"attention.sliding_window": 0})) == [0, 0]


def test_every_other_layer_has_experts() -> None:
    tiny = tiny_moe(4)
    experts = {
        name: None if x is None else x.shape for name, x in tiny.tensors.items() if name[:6] in ("blk.1.", "blk.3.")
    }
    config = read(tiny, {"interleave_moe_layer_step": 2}, experts)
    assert [layer.has_experts for layer in config.layers] == [False, True, False, True]


def test_gemma3() -> None:
    config = read(TINY_GEMMA3)
    assert [window > 0 for window in windows(config)] == [True, True, True, True, True, False]
    assert [config.attention(il).window for il in (0, 4, 5)] == [7, 7, 0]
    assert config.embd_scale == 8
    assert (config.rope_freq_base, config.rope_freq_base_swa) == (1e6, 1e4)


@pytest.mark.parametrize(
    ("metadata", "is_swa"),
    [
        ({"attention.sliding_window": None}, (False,) * 6),
        ({"attention.sliding_window_pattern": 2}, (True, False) * 3),
        (
            {"attention.sliding_window_pattern": np.array([1, 0, 0, 1, 1, 1], bool)},
            (True, False, False, True, True, True),
        ),
    ],
)
def test_gemma3_windows(metadata: Mapping[str, Any], is_swa: tuple[bool, ...]) -> None:
    assert tuple(window > 0 for window in windows(read(TINY_GEMMA3, metadata))) == is_swa


def test_gemma3_27b_scales_attention_by_the_embedding() -> None:
    tiny = Tiny(arch="gemma3", n_layer=62, n_embd=80, n_head=4, n_head_kv=2, head_dim=32, n_ff=32)
    assert read(tiny).attention_scale == pytest.approx(1 / math.sqrt(80 / 4))


def test_rope_scaling() -> None:
    assert read(Tiny(), {"rope.scale_linear": 4.0}).rope_scaling.factor == 4
    assert read(Tiny(), {"rope.scaling.factor": 2.0, "rope.scale_linear": 4.0}).rope_scaling.factor == 2
    assert read(Tiny(), {"rope.scaling.factor": 0.0}).rope_scaling.factor == 1
    keys = {"type": "yarn", "factor": 8.0, "original_context_length": 32, "attn_factor": 0.5, "yarn_beta_fast": 16.0}
    scaling = read(Tiny(), {f"rope.scaling.{key}": value for key, value in keys.items()}).rope_scaling
    assert (scaling.type, scaling.factor, scaling.n_ctx_orig, scaling.attn_factor) == ("yarn", 8, 32, 0.5)
    assert (scaling.beta_fast, scaling.beta_slow, scaling.ext_factor) == (16, 1, 1)
    assert (scaling.truncate, scaling.log_multiplier, scaling.yarn_attn_factor) == (True, 0, 0)
    keys = {"yarn_truncate": False, "yarn_log_multiplier": 0.7, "yarn_attn_factor": 1.5, "yarn_ext_factor": 0.0}
    scaling = read(Tiny(), {f"rope.scaling.{key}": value for key, value in keys.items()}).rope_scaling
    assert (scaling.truncate, scaling.log_multiplier, scaling.yarn_attn_factor) == (False, 0.7, 1.5)
    assert scaling.ext_factor == 0


def test_values_that_are_the_same_for_each_layer() -> None:
    arrays = {
        "attention.head_count_kv": np.array([2, 2], np.int32),
        "feed_forward_length": np.array([160, 160], np.uint32),
    }
    config = read(Tiny(), arrays)
    assert (config.n_head_kv, config.n_ff) == (2, 160)


BAD_METADATA: list[tuple[str, Any, str]] = [
    ("block_count", None, "llama.block_count is missing, must be an integer from 1 to 1024"),
    ("block_count", 0, "llama.block_count is 0, must be an integer from 1 to 1024"),
    ("block_count", 1 << 40, "llama.block_count is 1099511627776, must be an integer from 1 to 1024"),
    ("block_count", 3, r"tensor blk.2.attn_norm.weight is missing, must have 96 in this llama model"),
    ("block_count", 1, "tensor 'blk.1.attn_norm.weight' is not a part of a llama model of 1 layers"),
    ("block_count", True, "llama.block_count is True, must be an integer"),
    ("embedding_length", -4, "llama.embedding_length is -4, must be an integer from 1 to 2147483647"),
    ("embedding_length", 95, "tensor token_embd.weight has 96 x 50 values, must have 95 x 50"),
    ("embedding_length", "x" * 999, r"llama.embedding_length is 'x{56}\.\.\., must be"),
    ("context_length", None, "llama.context_length is missing"),
    ("feed_forward_length", [1, 2], "llama.feed_forward_length is an array of 2 values, must be"),
    ("feed_forward_length", np.array([160, 96]), "tensor blk.1.ffn_gate.weight has 96 x 160 values, must have 96 x 96"),
    ("attention.key_length", np.array([32, 16]), "attention.key_length differs from layer to layer \\(16 to 32\\)"),
    ("attention.head_count", 5, "llama.attention.head_count_kv is 2, must be a divisor of llama.attention.head_count"),
    ("attention.head_count_kv", 0, "llama.attention.head_count_kv is 0"),
    ("attention.head_count_kv", 1, "tensor blk.0.attn_k.weight has 96 x 64 values, must have 96 x 32"),
    ("attention.key_length", 16, "llama.attention.value_length is 32, must be the same as the length of a key"),
    ("attention.layer_norm_rms_epsilon", math.nan, "layer_norm_rms_epsilon is nan, must be a number from 0 to 1"),
    ("attention.layer_norm_rms_epsilon", "0", "layer_norm_rms_epsilon is '0', must be a number from 0 to 1"),
    ("rope.dimension_count", 31, "llama.rope.dimension_count is 31, must be even"),
    ("rope.dimension_count", 34, "llama.rope.dimension_count is 34, must be even and at most the length of a head, 32"),
    ("rope.freq_base", math.inf, "llama.rope.freq_base is inf, must be a number from 2 to 1e\\+12"),
    ("rope.freq_base", -1.0, "llama.rope.freq_base is -1.0, must be"),
    ("rope.scaling.type", "ntk", "rope.scaling.type is 'ntk'; this program runs: none, linear, yarn, longrope"),
    ("rope.scaling.factor", -1.0, "llama.rope.scaling.factor is -1.0"),
    ("expert_count", 8, "llama.expert_used_count is missing, must be an integer from 1 to 8"),
    ("expert_count", 2000, "llama.expert_count is 2000, must be an integer from 0 to 1024"),
    ("attention.causal", 0, "llama.attention.causal is 0, must be true or false"),
    ("pooling_type", 5, "llama.pooling_type is 5, must be an integer from 0 to 4"),
    ("residual_scale", 1e-9, "llama.residual_scale is 1e-09, must be a number from 1e-06 to 1e\\+06"),
    ("final_logit_softcapping", -30.0, "llama.final_logit_softcapping is -30.0, must be a number from 0"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD_METADATA)
def test_bad_metadata(key: str, value: Any, message: str) -> None:
    with pytest.raises((FormatError, UnsupportedError), match=message) as error:
        read(Tiny(), {key: value})
    assert "\n" not in str(error.value)


def test_heads_that_do_not_divide_the_embedding_need_a_length() -> None:
    with pytest.raises(FormatError, match=r"head_count is 5, must be a divisor of llama.embedding_length, which is 96"):
        read(Tiny(n_head=5, n_head_kv=5), {"attention.key_length": None, "attention.value_length": None})


@pytest.mark.parametrize("architecture", [None, 7, "mamba", "x" * 500 + "\n"])
def test_unknown_architecture(architecture: Any) -> None:
    metadata = {} if architecture is None else {"general.architecture": architecture}
    with pytest.raises(GgufRunError) as error:
        ModelConfig.from_metadata(metadata, {})
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 350
    if architecture == "mamba":
        expected = "general.architecture is 'mamba', which is not known; README.md lists those that this program runs"
        assert str(error.value) == expected


@pytest.mark.parametrize(
    ("shapes", "differs"),
    [
        ({}, "is llama: the file has the same tensors, but what it computes from them is not known"),
        ({"attn_k_norm.weight": (32,), "attn_q_norm.weight": (32,)}, "is qwen3: the file has the same"),
        (
            {"attn_rot.weight": (32,), "attn_output.weight": None},
            "has also 'attn_rot.weight' and lacks 'attn_output",
        ),
        (
            {f"x{i}.weight": (1,) for i in range(6)},
            "has also 'x0.weight', 'x1.weight', 'x2.weight', 'x3.weight' and 2 more",
        ),
    ],
)
def test_the_nearest_architecture(shapes: dict[str, tuple[int, ...] | None], differs: str) -> None:
    every_layer = {f"blk.{il}.{name}": shape for il in range(2) for name, shape in shapes.items()}
    with pytest.raises(UnsupportedError) as error:
        read(Tiny(arch="new"), shapes={**every_layer, "v.patch_embd.weight": (4, 4)})
    assert str(error.value).startswith("general.architecture is 'new', which is not known; the nearest that this")
    assert differs in str(error.value)


def test_parts_for_images_and_sound_are_left_out() -> None:
    parts = {"v.blk.0.attn_q.weight": (8, 8), "mm.input_projection.weight": (8, 96), "a.conv1d.0.weight": (3, 3)}
    with pytest.warns(UserWarning, match="3 tensors such as 'v.blk.0.attn_q.weight' are for images or sound: they are"):
        assert read(Tiny(), shapes=parts) == read(Tiny())


BAD_TENSORS: list[tuple[Tiny, str, tuple[int, ...] | None, str]] = [
    (Tiny(), "token_embd.weight", None, "tensor token_embd.weight is missing"),
    (Tiny(), "token_embd.weight", (96,), "tensor token_embd.weight has 96 values, must have 96 x"),
    (Tiny(), "output_norm.weight", None, "tensor output_norm.weight is missing, must have 96 in this llama"),
    (Tiny(), "output.weight", (49, 96), "tensor output.weight has 96 x 49 values, must have 96 x 50"),
    (Tiny(), "blk.1.ffn_down.weight", None, "tensor blk.1.ffn_down.weight is missing, must have 160 x 96"),
    (Tiny(), "blk.1.ffn_down.weight", (160, 96), "blk.1.ffn_down.weight has 96 x 160 values, must have 160 x 96"),
    (Tiny(), "blk.0.attn_q.bias", (64,), "tensor blk.0.attn_q.bias has 64 values, must have 128"),
    (Tiny(), "blk.0.attn_q.bias", (128,), "tensor blk.0.attn_k.bias is missing, though other biases"),
    (Tiny(), "blk.0.attn_q_norm.weight", (32,), "tensor 'blk.0.attn_q_norm.weight' is not a part of a llama model"),
    (Tiny(), "rope_freqs.weight", (15,), "tensor rope_freqs.weight has 15 values, must have 16"),
    (TINY_GEMMA3, "rope_freqs.weight", (15,), "tensor rope_freqs.weight has 15 values, must have 16"),
    (TINY_GEMMA3, "blk.5.post_ffw_norm.weight", None, "tensor blk.5.post_ffw_norm.weight is missing"),
    (TINY_GEMMA3, "blk.0.attn_k_norm.weight", (64,), "blk.0.attn_k_norm.weight has 64 values, must have 32"),
]


@pytest.mark.parametrize(("tiny", "name", "shape", "message"), BAD_TENSORS)
def test_bad_tensors(tiny: Tiny, name: str, shape: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises((FormatError, UnsupportedError), match=message):
        read(tiny, shapes={name: shape})


MIXTRAL = {"expert_count": 4, "expert_used_count": 2}
EXPERTS = {
    "ffn_gate_inp": (4, 96), "ffn_gate_exps": (4, 160, 96), "ffn_up_exps": (4, 160, 96), "ffn_down_exps": (4, 96, 160),
    "ffn_gate": None, "ffn_up": None, "ffn_down": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("", (), ""),
        ("ffn_up_exps.weight", (3, 160, 96), "ffn_up_exps.weight has 96 x 160 x 3 values, must have 96 x 160 x 4 in"),
        ("ffn_gate_inp.weight", None, "tensor blk.1.ffn_gate_inp.weight is missing"),
        ("ffn_up_exps.bias", (4, 160), "blk.1.ffn_gate_exps.bias is missing, though other biases"),
        ("ffn_up.weight", (160, 96), "tensor 'blk.1.ffn_up.weight' is not a part of a llama model"),
    ],
)
def test_experts(name: str, shape: tuple[int, ...] | None, message: str) -> None:
    shapes = {f"blk.{il}.{part}.weight": value for il in (0, 1) for part, value in EXPERTS.items()}
    if not name:
        config = read(Tiny(), MIXTRAL, shapes)
        assert (config.n_expert, config.moe.n_used, config.n_ff_exp, config.n_ff_shexp) == (4, 2, 160, 0)
        return
    with pytest.raises((FormatError, UnsupportedError), match=message):
        read(Tiny(), MIXTRAL, shapes | {f"blk.1.{name}": shape})


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, Mixture(2, True, 1.0, "silu", n_group_best=1)),
        ({"expert_gating_func": 2, "expert_weights_norm": False}, Mixture(2, False, 1.0, "silu", "sigmoid")),
        ({"expert_gating_func": 3, "expert_weights_norm": False}, Mixture(2, True, 1.0, "silu", n_group_best=1)),
        (
            {
                "expert_gating_func": 2,
                "expert_group_count": 2,
                "expert_group_used_count": 1,
                "expert_weights_scale": 2.5,
            },
            Mixture(2, True, 2.5, "silu", "sigmoid", 2, 1),
        ),
        ({"expert_group_count": 2, "expert_group_used_count": 2}, Mixture(2, True, 1.0, "silu", n_group_best=1)),
        ({"expert_gating_func": 4}, "llama.expert_gating_func is 4, must be an integer from 0 to 3"),
        (
            {"expert_group_count": 3, "expert_group_used_count": 1},
            "llama.expert_group_count is 3, must be a divisor of 4 that leaves 2 experts or more for a group, and 2 in",
        ),
    ],
)
def test_how_experts_are_chosen(keys: dict[str, Any], expected: Mixture | str) -> None:
    shapes = {f"blk.{il}.{part}.weight": value for il in (0, 1) for part, value in EXPERTS.items()}
    if isinstance(expected, Mixture):
        assert read(Tiny(), MIXTRAL | keys, shapes).moe == expected
        return
    with pytest.raises(FormatError, match=expected):
        read(Tiny(), MIXTRAL | keys, shapes)


def test_a_bias_of_the_router_means_sigmoid_where_no_key_tells() -> None:
    keys = Keys({"deepseek2.expert_used_count": 2, "deepseek2.expert_feed_forward_length": 8}, "deepseek2")
    for tensors, gating in (({}, "softmax"), ({"blk.1.exp_probs_b.bias": None}, "sigmoid")):
        assert read_experts(architecture("deepseek2"), keys, tensors, 4)[2].gating == gating


def test_shapes_may_end_in_ones_and_old_files_have_unused_tensors() -> None:
    read(Tiny(), shapes={"output_norm.weight": (1, 96), "blk.0.attn_rot_embd.weight": (16,)})


JUNK: list[Any] = [
    "", "none", -1, 0, 1, 7, 1 << 63, 0.0, -0.5, 1e300, math.nan, math.inf, True, False, [], ["a"], [[1], [2]],
    np.array([], np.int32), np.array([1, 2]), np.array([32, 32], np.uint64), np.array([True, False]),
    np.array([math.nan, 1.0]), [np.array([1]), np.array([2])],
]  # fmt: skip
KEYS = sorted(
    {
        *metadata_of(TINY_GEMMA3), "attention.sliding_window_pattern", "rope.dimension_count", "rope.scaling.type",
        "rope.scaling.factor", "rope.scale_linear", "rope.scaling.original_context_length", "rope.scaling.attn_factor",
        "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_beta_fast", "rope.freq_base_swa", "expert_count",
        "attention.causal", "final_logit_softcapping", "attn_logit_softcapping", "residual_scale", "logit_scale",
        "embedding_scale", "attention.scale", "expert_used_count", "expert_weights_scale", "leading_dense_block_count",
        "expert_feed_forward_length", "rope.scaling.yarn_log_multiplier",
    }
)  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("tiny", [Tiny(), TINY_GEMMA3], ids=["llama", "gemma3"])
def test_junk_is_read_or_refused_in_one_line(tiny: Tiny, key: str) -> None:
    for junk in JUNK:
        try:
            config = read(tiny, {key: junk})
        except GgufRunError as error:
            message = str(error)
            assert len(message) < 250, message
            assert "\n" not in message
        else:
            assert config.head_dim > 0
            numbers = config.rms_eps, config.rope_freq_base, config.rope_scaling.factor, config.embd_scale
            assert all(math.isfinite(x) for x in (*numbers, config.logit_scale, config.attention_scale))
