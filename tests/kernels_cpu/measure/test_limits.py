"""The kernels that measure the machine's limits do the work that is counted, and the figures are figures."""

from pathlib import Path

import numpy as np
import pytest

from gguf_run.kernels_cpu.measure import limits
from gguf_run.kernels_cpu.measure.limits import measure_limits
from gguf_run.kernels_cpu.panels.memory import aligned
from gguf_run.kernels_cpu.replay.op import TapeOp
from gguf_run.kernels_cpu.replay.team import Team


def run_op(op: TapeOp, n_threads: int, **arguments: int) -> None:
    bound = op.bind(**arguments)
    team = Team(n_threads)
    try:
        team.run(np.array([(op.compiled.address, bound.ctypes.data)], np.int64))
    finally:
        team.close()


@pytest.mark.parametrize("n_threads", [1, 2])
def test_read_op_reads_every_byte(n_threads: int) -> None:
    """It adds up all lines, as 16 lanes of i32 that wrap around, in a sum of each thread."""
    data, sums = aligned(5 * limits._READ_PIECE), aligned(64 * n_threads)
    data[:] = np.random.default_rng(0).integers(0, 256, len(data), np.uint8)
    run_op(limits._read, n_threads, data=data.ctypes.data, n_bytes=len(data), sums=sums.ctypes.data)
    found, expected = (lines.view(np.uint32).reshape(-1, 16).sum(0, np.uint32) for lines in (sums, data))
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("n_threads", [1, 2])
def test_dot_op_does_the_products_that_are_counted(n_threads: int) -> None:
    data, sums = aligned(4096), aligned(64 * n_threads)
    # u is below 2^_DOT_BITS; so is x, the start of the same memory
    data[:] = np.random.default_rng(0).integers(0, 1 << limits._DOT_BITS, len(data), np.uint8)
    run_op(limits._dot, n_threads, data=data.ctypes.data, sums=sums.ctypes.data)
    side = limits._DOT_SIDES.get(limits.isa.current().dot, 2)
    vectors = data[: 8 * side * 64].reshape(8, side, 16, 4).astype(np.int64)
    steps = np.bincount(np.arange(limits._DOT_STEPS) & 7, minlength=8) * limits._DOT_PIECES * n_threads
    expected = np.einsum("i,iurj,xrj->r", steps, vectors, vectors[0]).astype(np.uint32)
    found = sums.view(np.uint32).reshape(-1, 16).sum(0, np.uint32)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("n_threads", [1, 3])
def test_figures_are_plausible(n_threads: int) -> None:
    """Any machine from a phone to a server, however busy."""
    found = measure_limits(n_threads, n_bytes=5_000_000, seconds=1e-3)
    assert found.n_threads == n_threads
    assert 1e7 < found.read_bytes < 1e13
    assert 1e7 < found.int8_ops < 1e15


def test_more_memory_is_read_than_all_caches_hold(tmp_path: Path) -> None:
    """Two processors with a last-level cache of 100 MB for two cores each; every core has caches of its own."""

    def cache(cpu: int, index: int, level: int, kind: str, size: str, shared: str) -> None:
        folder = tmp_path / f"cpu{cpu}/cache/index{index}"
        folder.mkdir(parents=True)
        for name, text in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
            (folder / name).write_text(f"{text}\n")

    assert limits._read_size(tmp_path) == 512 << 20  # nothing known
    for cpu in range(4):
        cache(cpu, 0, 1, "Data", "32K", str(cpu))
        cache(cpu, 1, 1, "Instruction", "32K", str(cpu))
        cache(cpu, 2, 2, "Unified", "1024K", str(cpu))
        cache(cpu, 3, 3, "Unified", "102400K", "0-1" if cpu < 2 else "2-3")
    assert limits._read_size(tmp_path) == 16 * (4 * 1088 + 2 * 102400) << 10
    (tmp_path / "cpu0/cache/index3/size").write_text("4194304K")
    assert limits._read_size(tmp_path) == 4 << 30
