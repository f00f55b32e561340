"""What this process may use of the machine: threads, memory, a GPU.

Linux control groups (cgroups, v1 and v2) limit the CPUs and the memory of a container.
"""

import os
import platform
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

# What drivers leave in the system: NVIDIA's, AMD's, and that of Linux in Windows.
_DRIVERS = ("dev/nvidiactl", "dev/kfd", "dev/dxg")


def default_threads() -> int:
    """Return the number of physical cores that this process may use, at least 1.

    Two hardware threads of one core share its vector units: a second one adds nothing to these kernels. Slower cores
    hold up the others, which wait for them. A team of threads larger than its share of CPU time is put to sleep at a
    barrier. So these are the performance cores of the CPUs in the affinity mask, and at most the whole CPUs that the
    cgroup grants.
    """
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:
        # macOS and Windows have no affinity mask: x86 machines mostly have two hardware threads per core.
        n_cpu = os.cpu_count() or 1
        return max(1, n_cpu // 2) if platform.machine().lower() in ("x86_64", "amd64") else n_cpu
    return available_cores(cpus)


def available_cores(cpus: Iterable[int], root: Path = Path("/")) -> int:
    """Count the physical cores behind logical `cpus`, at most the cgroup's quota. `root` holds /sys and /proc.

    If some of them are performance cores, only those count.
    """
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"  # the same for all threads of one core
    n_core = len({_read(root / topology.format(cpu)) or cpu for cpu in _fast_cpus({*cpus}, root)})
    return max(1, min([n_core, *map(int, _quotas(root))]))


def _fast_cpus(cpus: set[int], root: Path) -> set[int]:
    """Return the CPUs that are performance cores; all if there is but one kind."""
    # Intel names them: "0-15" or "0,2,4".
    ranges = re.findall(r"(\d+)(?:-(\d+))?", _read(root / "sys/devices/cpu_core/cpus"))
    if named := {cpu for cpu in cpus if any(int(first) <= cpu <= int(last or first) for first, last in ranges)}:
        return named
    # ARM: the speed of each core, where the fastest has 1024. Middle cores count as fast, little ones do not.
    texts = {cpu: _read(root / f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity") for cpu in cpus}
    speeds = {cpu: int(text) for cpu, text in texts.items() if text.isdigit()}
    return {cpu for cpu in cpus if 2 * speeds.get(cpu, 1024) >= max(speeds.values(), default=0)}


def _quotas(root: Path) -> Iterator[float]:
    """Yield the CPUs granted by each cgroup that has a limit."""
    for group in _cgroups("cpu", root):
        v1 = f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}"
        # "max" (v2) and -1 (v1) mean no limit.
        if match := re.fullmatch(r"(\d+) ([1-9]\d*)", _read(group / "cpu.max") or v1):
            yield int(match[1]) / int(match[2])


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes, swap included, that this process can take before others are killed; None if not known."""
    meminfo = dict(re.findall(r"^(\w+): +(\d+) kB$", _read(root / "proc/meminfo"), re.MULTILINE))
    if "MemAvailable" not in meminfo:
        return None
    left = [1024 * (int(meminfo["MemAvailable"]) + int(meminfo.get("SwapFree", 0)))]
    for group in _cgroups("memory", root):
        limit = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")  # v2 or v1
        used = _read(group / "memory.current") or _read(group / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():
            # Cached file pages count as used, but are given up when memory is needed. v1 counts those of the groups
            # below in lines of their own, "total_...".
            cached = re.findall(r"^(?:total_)?inactive_file (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
            left.append(int(limit) - int(used) + max(map(int, cached), default=0))
    return max(0, min(left))


def driver_there(root: Path = Path("/")) -> bool:
    """Whether this machine seems to have a GPU. To ask torch would take a second or two, for its import."""
    if os.name == "nt":
        return (Path(os.environ.get("SYSTEMROOT", "C:/Windows")) / "System32/nvcuda.dll").exists()
    return any((root / name).exists() for name in _DRIVERS)


def _cgroups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of the cgroups that this process is in, its own first. `root` holds /sys and /proc."""
    mounts = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        # "0::/user.slice/a" (v2) or "4:cpu,cpuacct:/a" (v1). In a container the path may be the host's: then only
        # the mount itself exists, and it is the container's group.
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = mounts / controllers
        group = mount / path.lstrip("/")
        yield from (level for level in (group, *group.parents) if level.is_relative_to(mount))


def _read(path: Path) -> str:
    """Return the text of a small file of the kernel, "" if there is none."""
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
