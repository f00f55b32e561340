"""What KV caches take, which types models allow, what is advised where memory is short."""

import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tinymodel import TINY_GEMMA3, Tiny, write_tiny

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.kernels_cpu.attention.cache_types import CACHE_FORMATS
from gguf_run.kernels_cpu.backend import CpuBackend
from gguf_run.kernels_gpu import sizes
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.pages import PageTable
from gguf_run.runtime.load.cache_plan import cells_in, fit_cache, layer_bytes, plan_cache
from gguf_run.runtime.load.describe import describe_plan
from gguf_run.runtime.load.kv_scales import LayerScales, write_scales
from gguf_run.runtime.load.memory import MemoryPlan

# Bytes of a row of 64 numbers, from ggml's block layouts and from "one f16 scale for each row".
ROW_OF_64 = {
    "f32": 256, "f16": 128, "bf16": 128, "q8_0": 2 * 34, "q5_1": 2 * 24, "q5_0": 2 * 22, "q4_1": 2 * 20, "q4_0": 2 * 18,
    "iq4_nl": 2 * 18, "int8": 66, "fp8_e4m3": 66, "fp8_e5m2": 66, "int4": 2 * 18,
}  # fmt: skip


def total_bytes(config: ModelConfig, *plan: Any, n_seq: int = 1) -> int:
    return sum(layer_bytes(config, *plan, n_seq=n_seq))


def config_of(folder: Path, tiny: Tiny) -> ModelConfig:
    write_tiny(folder / "m.gguf", tiny)
    with GGUFFile.open(folder / "m.gguf") as file:
        return ModelConfig.from_metadata(file.metadata, file.tensors)


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    return config_of(tmp_path, Tiny(head_dim=64))  # 2 layers, 2 KV heads


@pytest.mark.parametrize(("name", "row"), ROW_OF_64.items())
def test_bytes_of_each_type(config: ModelConfig, name: str, row: int) -> None:
    assert total_bytes(config, plan_cache(config, name), 128, 128) == 2 * 2 * 2 * 128 * row
    mixed = plan_cache(config, (name, "f16"))
    assert total_bytes(config, mixed, 128, 128) == 2 * 2 * 128 * (row + 128)
    assert total_bytes(config, mixed, 97, 97, n_seq=3) == 3 * total_bytes(config, mixed, 128, 128)
    assert sizes.cache_bytes(config.attention(0), mixed[0], n_pages=2) == 2 * 128 * (row + 128)  # on a GPU


@pytest.mark.parametrize(("name", "ratio"), [("q8_0", 0.53125), ("q4_0", 0.28125), ("int8", 0.5078125)])
def test_parts_of_f16(tmp_path: Path, name: str, ratio: float) -> None:
    """Heads of 128 numbers, as most models have."""
    config = config_of(tmp_path, Tiny(head_dim=128))
    f16, other = (total_bytes(config, plan_cache(config, kind), 4096, 512) for kind in ("f16", name))
    assert other == ratio * f16


def test_types_and_rotation(config: ModelConfig) -> None:
    assert plan_cache(config) == (CacheType("f16", "f16"),) * 2
    assert plan_cache(config, ("q8_0", "q4_0")) == (CacheType("q8_0", "q4_0"),) * 2
    assert plan_cache(config, "q4_0", cache_rotation=False) == (CacheType("q4_0", "q4_0", False),) * 2
    assert plan_cache(config, "int8", cache_rotation=True) == (CacheType("int8", "int8", True),) * 2
    each = [CacheType("f16", "f32"), CacheType("int8", "int8")]
    assert plan_cache(config, each) == tuple(each)


def test_descriptions_differ_where_bytes_mean_something_else(config: ModelConfig, tmp_path: Path) -> None:
    each = [CacheType("f16", "f32"), CacheType("int8", "int8")]
    static = [tmp_path / f"{n}.json" for n in (1, 2)]
    for n, path in enumerate(static, 1):
        write_scales(path, (LayerScales((n, 1.0), (2.0, 0.0)),) * 2)
    plans = {
        "int8": plan_cache(config, "int8"),
        "K f16, V q4_0": plan_cache(config, ("f16", "q4_0")),
        "q4_0": plan_cache(config, "q4_0"),
        "q4_0, not rotated": plan_cache(config, "q4_0", cache_rotation=False),
        "fp8_e4m3": plan_cache(config, "fp8_e4m3"),
        r"1 x K f16, V f32; 1 x int8 \(layers \w{8}\)": each,
        r"1 x int8; 1 x K f16, V f32 \(layers \w{8}\)": each[::-1],
        r"fp8_e4m3 \(layers \w{8}\)": plan_cache(config, "fp8_e4m3", cache_scales=static[0]),
        r"fp8_e4m3 \(layers (\w{8})\)": plan_cache(config, "fp8_e4m3", cache_scales=static[1]),
    }
    found = {pattern: describe_plan(plan) for pattern, plan in plans.items()}
    assert all(re.fullmatch(pattern, text) for pattern, text in found.items()), found
    assert len(set(found.values())) == len(plans)


def test_types_that_heads_do_not_allow(tmp_path: Path) -> None:
    config = config_of(tmp_path, Tiny(head_dim=12, n_embd=48))
    words = (
        "--cache-type-v q4_0 stores blocks of 32 numbers, the model's heads have 12; allowed: f32, f16, bf16, int8, fp8"
    )
    with pytest.raises(OptionError, match=words):
        plan_cache(config, ("int8", "q4_0"))
    with pytest.raises(OptionError, match="--cache-type-k is 'q9'; allowed: f32, "):
        plan_cache(config, ("q9", "f16"))


def memory_plan(tmp_path: Path, n_ctx: int, kind: str = "f16", tiny: Tiny | None = None) -> MemoryPlan:
    write_tiny(tmp_path / "m.gguf", tiny or Tiny(head_dim=64))
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
        return MemoryPlan(config, list(file.tensors.values()), n_ctx, plan_cache(config, kind), n_batch=32)


def test_memory_that_is_enough(tmp_path: Path) -> None:
    plan = memory_plan(tmp_path, 4096)
    need = plan.needed()
    assert need.total == need.weights + need.cache + need.buffers
    plan.check(None)
    plan.check(need.total)


def test_what_would_fit(tmp_path: Path) -> None:
    """What is advised fits, and the next larger context does not."""
    plan = memory_plan(tmp_path, 4096)
    available = plan.needed().total - 1
    with pytest.raises(
        GgufRunError, match=r"of 4096 tokens as f16 4\.19 MB\).*--ctx-size 3840 or --cache-type q8_0 would"
    ):
        plan.check(available)
    half = replace(plan, n_ctx=1536).needed().total
    with pytest.raises(GgufRunError, match=r"--ctx-size 1536 or --cache-type q4_0 would fit"):
        plan.check(half)
    with pytest.raises(GgufRunError, match=r": --ctx-size 1280 would fit"):
        memory_plan(tmp_path, 4096, "q4_0").check(memory_plan(tmp_path, 1280, "q4_0").needed().total)
    with pytest.raises(GgufRunError, match="choose a smaller context"):
        plan.check(plan.needed().weights)


def test_heads_that_allow_no_blocks_are_advised_int8(tmp_path: Path) -> None:
    plan = memory_plan(tmp_path, 4096, tiny=Tiny(head_dim=48))
    with pytest.raises(GgufRunError, match=r"--cache-type int8 would fit"):
        plan.check(plan.needed().total - 1)


@pytest.mark.parametrize("kind", ROW_OF_64)
@pytest.mark.parametrize("tiny", [Tiny(head_dim=40), TINY_GEMMA3])
def test_bytes_are_those_that_are_held(tmp_path: Path, tiny: Tiny, kind: str) -> None:
    """Heads that are filled up, windows, contexts that are no whole pages, several sequences."""
    config = config_of(tmp_path, tiny)
    if not CACHE_FORMATS[kind].allows(config.head_dim):
        return
    for n_ctx, n_batch, n_seq in ((100, 7, 1), (1000, 512, 3)):
        plan = plan_cache(config, (kind, "f16"))
        with closing(CpuBackend(1)) as backend:
            for il, layer in enumerate(plan):
                shape = config.attention(il)
                backend.cache(shape, PageTable.new(shape.window, n_ctx, max(min(n_batch, n_ctx), n_seq), n_seq), layer)
            assert backend.nbytes()["cache"] == total_bytes(config, plan, n_ctx, n_batch, n_seq=n_seq)


@pytest.mark.parametrize("tiny", [Tiny(), TINY_GEMMA3])
def test_a_cache_of_so_many_bytes(tmp_path: Path, tiny: Tiny) -> None:
    config = config_of(tmp_path, tiny)
    plan = plan_cache(config)
    n_cells = cells_in(8 << 20, config, plan, 500, 64, 3)
    sizes = [sum(layer_bytes(config, plan, 500, 64, 3, n)) for n in (n_cells, n_cells + 64)]
    assert n_cells % 64 == 0
    assert sizes[0] <= 8 << 20 < sizes[1]
    with pytest.raises(OptionError, match="is 0 MiB; allowed: at least 1, for one sequence of 500 tokens"):
        cells_in(1000, config, plan, 500, 64, 3)


@pytest.mark.parametrize("tiny", [Tiny(n_ctx=1 << 20), replace(TINY_GEMMA3, n_ctx=1 << 20)])
def test_a_server_takes_a_part_of_the_memory(tmp_path: Path, tiny: Tiny) -> None:
    """Whole contexts if they fit; else pages for all together; at last a shorter context, but one has room always."""
    config = config_of(tmp_path, tiny)
    plan = plan_cache(config)
    seen = set()
    for n_bytes in (0, *(1 << n for n in range(20, 36))):
        n_ctx, n_cells = fit_cache(n_bytes, config, plan, None, 64, 4)
        size = sum(layer_bytes(config, plan, n_ctx, 64, 4, n_cells))
        assert n_ctx in (4096, 8192, 16384, 32768)
        assert n_cells is None or n_cells >= n_ctx
        assert size <= n_bytes or (n_ctx == 4096 and n_cells == 4096)
        seen.add((n_ctx, n_cells is None))
        assert fit_cache(n_bytes, config, plan, 1000, 64, 4)[0] == 1000
    assert {(4096, False), (32768, False), (32768, True)} <= seen
