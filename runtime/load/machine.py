"""How many threads compute: the physical cores that this process may use.

Two hardware threads of one core share its vector units, so a second one adds nothing to these kernels; and a team
larger than its share of CPU time (container quotas) is put to sleep at a barrier. Hence: the cores of the CPUs in the
affinity mask, at most the whole CPUs of the cgroup quota.
"""

import os
import platform
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from gguf_run.runtime.load import cgroup


def default_threads() -> int:
    """Return the number of physical cores available to this process, at least 1."""
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:
        # No affinity mask to ask (macOS, Windows): x86 machines mostly have two hardware threads per core.
        n_cpu = os.cpu_count() or 1
        return max(1, n_cpu // 2) if platform.machine().lower() in ("x86_64", "amd64") else n_cpu
    return available_cores(cpus)


def available_cores(cpus: Iterable[int], root: Path = Path("/")) -> int:
    """Count the physical cores behind logical `cpus`, at most the cgroup quota. `root` holds /sys and /proc."""
    n_core = len({_siblings(cpu, root) for cpu in cpus})
    return max(1, min([n_core, *(int(quota) for quota in _quotas(root))]))


def _siblings(cpu: int, root: Path) -> str:
    """A text that is the same for all hardware threads of one core."""
    return cgroup.read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or f"cpu{cpu}"


def _quotas(root: Path) -> Iterator[float]:
    """Yield the CPUs granted by each cgroup that has a limit."""
    for group in cgroup.levels("cpu", root):
        v1 = f"{cgroup.read(group / 'cpu.cfs_quota_us')} {cgroup.read(group / 'cpu.cfs_period_us')}"
        # "max" (v2) and -1 (v1) mean no limit.
        if match := re.fullmatch(r"(\d+) ([1-9]\d*)", cgroup.read(group / "cpu.max") or v1):
            yield int(match[1]) / int(match[2])
