"""CPU cores that this process may use. A container's quota is often far below the machine's cores, and torch counts
these: with more threads than the quota allows, small operations take many times as long."""

from __future__ import annotations

import math
import os
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def usable(groups: Path = GROUPS, own: Path = OWN) -> int:
    """At least 1: the cores of the process's affinity, or its CPU quota (cgroup v2 or v1, rounded up) if lower."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, *_quotas(groups, own))))


def busy() -> float:
    """The share of the cores that were busy in the last minute, this process's own start included; 0 if unknown."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (AttributeError, OSError):  # not on Windows
        return 0.0


def _quotas(groups: Path, own: Path) -> list[float]:
    """The quotas in cores of the process's group and of all groups that contain it; inf if there are none."""
    folders = {groups, groups / "cpu"}  # a container sees its own group as the root
    for line in _words(own):
        path = Path(line.rpartition(":")[2].lstrip("/"))
        folders |= {base / part for part in (path, *path.parents) for base in (groups, groups / "cpu")}
    found = [math.inf]
    for folder in folders:
        found.append(_quotient(_words(folder / "cpu.max")))
        found.append(_quotient([*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]))
    return found


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return []


def _quotient(numbers: list[str]) -> float:
    """Of two positive numbers, such as 200000 and 100000. inf for anything else: "max" and -1 mean no quota."""
    try:
        microseconds, period = map(float, numbers)
    except ValueError:
        return math.inf
    return microseconds / period if microseconds > 0 and period > 0 else math.inf


def limit_threads() -> None:
    """Lowers torch's threads to `usable`, unless OMP_NUM_THREADS is set."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > (most := usable()):
        torch.set_num_threads(most)
