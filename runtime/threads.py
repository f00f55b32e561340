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

ROOT = Path("/")


def default_threads() -> int:
    """Return the number of physical cores available to this process, at least 1."""
    cpus = _affinity()
    if cpus is None:
        # No affinity mask to ask (macOS, Windows): x86 machines mostly have two hardware threads per core.
        n_cpu = os.cpu_count() or 1
        return max(1, n_cpu // 2) if platform.machine().lower() in ("x86_64", "amd64") else n_cpu
    return available_cores(cpus)


def available_cores(cpus: Iterable[int], root: Path = ROOT) -> int:
    """Count the physical cores behind logical `cpus`, at most the cgroup quota. `root` holds /sys and /proc."""
    n_core = len({_siblings(cpu, root) for cpu in cpus})
    return max(1, min([n_core, *(int(quota) for quota in _quotas(root))]))


def _affinity() -> set[int] | None:
    try:
        return set(os.sched_getaffinity(0))
    except AttributeError:
        return None


def _siblings(cpu: int, root: Path) -> str:
    """A text that is the same for all hardware threads of one core."""
    text = _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return text or f"cpu{cpu}"


def _quotas(root: Path) -> Iterator[float]:
    """Yield the CPUs granted by each cgroup that this process is in: its own and those above it (v2 and v1)."""
    mounts = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        # "0::/user.slice/a" (v2) or "4:cpu,cpuacct:/a" (v1). In a container the path may be the host's: then only
        # the mount itself exists, and it is the container's group.
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = mounts / controllers
        group = mount / path.lstrip("/")
        for level in (group, *group.parents):
            if level.is_relative_to(mount):
                yield from _quota(level)


def _quota(group: Path) -> Iterator[float]:
    text = _read(group / "cpu.max") or f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}"
    # "max" (v2) and -1 (v1) mean no limit.
    if match := re.fullmatch(r"(\d+) ([1-9]\d*)", text):
        yield int(match[1]) / int(match[2])


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
