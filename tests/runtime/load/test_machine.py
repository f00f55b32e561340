"""What this process may use: cores, memory, devices. Kernel files are played by folders."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from gguf_run.runtime.load.machine import available_cores, available_memory, default_threads

GIB = 1 << 30
MEMINFO = "MemTotal: 16777216 kB\nMemFree: 1048576 kB\nMemAvailable: 8388608 kB\nSwapFree: 2097152 kB\n"
V1_MEMORY = "sys/fs/cgroup/memory/box"


def write(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def cpu(number: int, siblings: str) -> dict[str, str]:
    return {f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list": siblings}


FOUR_CORES = {name: text for n in range(8) for name, text in cpu(n, f"{n % 4},{n % 4 + 4}").items()}


# Two performance cores of two hardware threads each, and four efficiency cores.
HYBRID = {name: text for n in range(4) for name, text in cpu(n, f"{n // 2 * 2}-{n // 2 * 2 + 1}").items()}
HYBRID |= {name: text for n in range(4, 8) for name, text in cpu(n, str(n)).items()}
INTEL = HYBRID | {"sys/devices/cpu_core/cpus": "0-3", "sys/devices/cpu_atom/cpus": "4-7"}
CAPACITY = "sys/devices/system/cpu/cpu{}/cpu_capacity"
# Four little cores, three middle ones and a fast one.
ARM = {CAPACITY.format(n): str(speed) for n, speed in enumerate([290] * 4 + [760] * 3 + [1024])}


@pytest.mark.parametrize(
    ("cpus", "files", "n_cores"),
    [
        (range(8), FOUR_CORES, 4),
        (range(8), INTEL, 2),
        (range(8), HYBRID, 6),
        ([0, 1, 4, 5], INTEL, 1),
        ([4, 5, 6], INTEL, 3),  # affinity leaves efficiency cores only
        (range(8), INTEL | {"sys/devices/cpu_core/cpus": "0,2-3"}, 2),
        (range(8), INTEL | {"sys/devices/cpu_core/cpus": "garbage"}, 6),
        (range(8), INTEL | {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"}, 1),
        (range(8), ARM, 4),
        (range(5), ARM, 1),
        (range(4), ARM, 4),  # affinity leaves little cores only
        (range(8), ARM | {CAPACITY.format(7): "unknown"}, 4),
        (range(4), {CAPACITY.format(n): "0" for n in range(4)}, 4),
        ([0, 4], FOUR_CORES, 1),  # affinity: two hardware threads of one core
        ([0, 1, 5], FOUR_CORES, 2),
        (range(3), {}, 3),  # no topology: each CPU is a core
        (range(8), FOUR_CORES | {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 4),
        (range(8), FOUR_CORES | {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, 2),
        (range(8), FOUR_CORES | {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        # The limit of a group above counts; the path of the host is not there in a container.
        (range(8), FOUR_CORES | {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3),
        (range(8), FOUR_CORES | {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
        (
            range(8),
            FOUR_CORES
            | {
                "proc/self/cgroup": "5:memory:/box\n4:cpu,cpuacct:/box\n0::/",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        (range(8), FOUR_CORES | {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "garbage"}, 4),
    ],
)
def test_available_cores(tmp_path: Path, cpus: list[int], files: dict[str, str], n_cores: int) -> None:
    assert available_cores(cpus, write(tmp_path, files)) == n_cores


def test_default_threads_of_this_machine() -> None:
    assert default_threads() >= 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/meminfo": MEMINFO}, 10 * GIB),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/box",
                "sys/fs/cgroup/box/memory.max": str(4 * GIB),
                "sys/fs/cgroup/box/memory.current": str(3 * GIB),
                "sys/fs/cgroup/box/memory.stat": f"anon 5\ninactive_file {GIB}\nfile 7",
            },
            2 * GIB,
        ),
        (
            {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max"}
            | {"sys/fs/cgroup/memory.current": "5"},
            10 * GIB,
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "3:memory:/box",
                f"{V1_MEMORY}/memory.limit_in_bytes": str(2 * GIB),
                f"{V1_MEMORY}/memory.usage_in_bytes": str(GIB),
                f"{V1_MEMORY}/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}",
            },
            GIB + GIB // 2,
        ),
    ],
)
def test_available_memory(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    assert available_memory(write(tmp_path, files)) == expected
