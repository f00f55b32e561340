"""The list of ops of a model with their sizes, and that every interpreter knows every op."""

from pathlib import Path
from typing import get_args

import pytest
from click.testing import CliRunner
from numpy_backend import FUNCTIONS
from tinymodel import AWKWARD_LLAMA, TINY_GEMMA3, Tiny, tiny_moe, write_tiny

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.kernels_cpu.attention.cache_types import cache_bytes
from gguf_run.kernels_cpu.lower import LOWER
from gguf_run.kernels_cpu.lower_rare import LOWER_RARE
from gguf_run.kernels_cpu.panels.panels import matrix_bytes
from gguf_run.models import ops
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.op_costs import OPERATIONS, OpCost, Sizes, op_costs
from gguf_run.models.protocol import Op
from gguf_run.runtime.cli.info import main
from gguf_run.runtime.load.cache_plan import layer_bytes

OPS = {getattr(kind, "__origin__", kind) for kind in get_args(Op)}


def costs(tiny: Tiny, folder: Path, n_ctx: int = 64) -> tuple[ModelConfig, GGUFFile, list[OpCost]]:
    write_tiny(folder / "tiny.gguf", tiny)
    file = GGUFFile.open(folder / "tiny.gguf")
    config = ModelConfig.from_metadata(file.metadata, file.tensors)
    kinds = [CacheType("q8_0", "f16")] * config.n_layer
    return config, file, op_costs(config, file.tensors, kinds, n_ctx, Sizes(matrix_bytes, cache_bytes))


def test_every_interpreter_has_every_op() -> None:
    assert len(OPS) == 24
    assert LOWER.keys() | LOWER_RARE.keys() >= OPS
    assert FUNCTIONS.keys() == OPS
    assert OPERATIONS.keys() | {ops.Observe} == OPS  # which no model has that only runs


def test_the_ops_of_a_layer(tmp_path: Path) -> None:
    _, _, found = costs(Tiny(n_layer=1), tmp_path)
    assert [cost.op for cost in found] == [
        *("Embed", "RmsNorm", "Matmul", "Rope", "Attend", "Matmul", "Outputs", "RmsNorm", "MatmulGated", "Matmul"),
        *("RmsNorm", "Matmul"),
    ]
    assert found[2].tensors == ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight")


@pytest.mark.parametrize("tiny", [AWKWARD_LLAMA, Tiny(type="Q4_0"), tiny_moe(2)], ids=["llama", "Q4_0", "moe"])
def test_all_weights_are_read_once(tiny: Tiny, tmp_path: Path) -> None:
    """A token reads one row of the embeddings, and only its own experts."""
    config, file, found = costs(tiny, tmp_path)
    part = config.moe.n_used / config.n_expert if config.moe else 0
    expected = operations = 0.0
    for name, tensor in file.tensors.items():
        if ("token_embd" in name and not tiny.tied) or name.startswith("rope_"):
            continue
        share = part if "_exps." in name else 1
        is_matrix = len(tensor.ne) > 1 or "gate_inp_shexp" in name  # a matrix of one row
        expected += share * (
            matrix_bytes(tensor.type.name, tensor.ne[0], tensor.n_rows) if is_matrix else tensor.nbytes
        )
        operations += 2 * share * tensor.n_elements if is_matrix else 0
    row = file.tensors["token_embd.weight"].type.row_bytes(config.n_embd)
    cache = sum(layer_bytes(config, [CacheType("q8_0", "f16")] * config.n_layer, 64, 64))
    assert sum(cost.nbytes for cost in found) == pytest.approx(expected + row + cache, abs=config.n_layer)
    products = sum(cost.operations for cost in found if cost.op in ("Matmul", "MatmulGated", "Moe"))
    assert products == pytest.approx(operations, rel=1e-3)


def test_a_window_bounds_what_attention_reads(tmp_path: Path) -> None:
    _, _, found = costs(TINY_GEMMA3, tmp_path)
    window, every = sorted({cost.operations for cost in found if cost.op == "Attend"})
    assert (window, every) == (4 * 4 * 32 * 7, 4 * 4 * 32 * 64)


def test_gguf_info_shows_them(tmp_path: Path) -> None:
    _, _, found = costs(Tiny(), tmp_path, 100)
    done = CliRunner().invoke(main, [str(tmp_path / "tiny.gguf"), "--ops", "-c", "100", "--cache-type", "q8_0"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert "context of 100 tokens" in lines[0]
    assert sum("blk.1.ffn_gate, ffn_up" in line for line in lines) == 1
    assert lines[-1].split()[:2] == ["all", str(len(found))]
    assert CliRunner().invoke(main, [str(tmp_path / "tiny.gguf"), "--ops", "--tensors"]).exit_code == 2
