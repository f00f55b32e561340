"""Linux control groups (v1 and v2): where the limits of this process stand."""

from collections.abc import Iterator
from pathlib import Path


def levels(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """Yield the folders of the cgroups that this process is in, its own first. `root` holds /sys and /proc."""
    mounts = root / "sys/fs/cgroup"
    for line in read(root / "proc/self/cgroup").splitlines():
        # "0::/user.slice/a" (v2) or "4:cpu,cpuacct:/a" (v1). In a container the path may be the host's: then only
        # the mount itself exists, and it is the container's group.
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = mounts / controllers
        group = mount / path.lstrip("/")
        yield from (level for level in (group, *group.parents) if level.is_relative_to(mount))


def read(path: Path) -> str:
    """Return the text of a small file of the kernel, "" if there is none."""
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
