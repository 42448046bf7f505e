"""What this process may use of the machine: cores and memory, within the limits of its container."""

import os
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 62


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Return the cores that this process may keep busy: at most those it may run on, and its container's share."""
    return min(len(os.sched_getaffinity(0)), _cores(_read(cgroup / "cpu.max")))


def available_bytes(cgroup: Path = _CGROUP) -> int:
    """Return the memory that can be had now: what the machine has, and what the container's limit leaves."""
    return min(psutil.virtual_memory().available, memory_left(cgroup))


def memory_left(cgroup: Path) -> int:
    """Return the bytes left under a version 2 control group's limit; `UNLIMITED` if it has none."""
    limit, used = _read(cgroup / "memory.max").strip(), _read(cgroup / "memory.current").strip()
    if not limit.isdigit() or not used.isdigit():
        return UNLIMITED
    # Files that were read, weights above all, count as used until somebody wants their memory.
    stat = dict(line.split(" ", 1) for line in _read(cgroup / "memory.stat").splitlines() if " " in line)
    return max(0, int(limit) - int(used) + int(stat.get("inactive_file", 0)))


def _cores(cpu_max: str) -> int:
    quota, _, period = cpu_max.partition(" ")
    if not quota.isdigit() or not period.strip().isdigit():
        return UNLIMITED
    return max(1, int(quota) // int(period))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
