"""How many threads are worth starting: what this process may use, not what the machine has."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch


def available_cpus(root: Path = Path("/")) -> int:
    """The number of CPUs that this process may use: its affinity and a container's quota, or 1.

    A quota of part of a CPU is rounded down, because threads beyond it would be throttled while
    the others wait for them. `root` is where /proc and /sys are found.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it.
    cpus = (os.cpu_count() or 1) if affinity is None else len(affinity(0))
    return max(1, int(min(cpus, _quota(root))))


def usable_threads() -> int:
    """The number of threads that torch uses, or fewer where this process may use fewer CPUs."""
    return min(torch.get_num_threads(), available_cpus())


@functools.cache
def _quota(root: Path) -> float:
    """The CPUs that the control groups of this process grant, infinite without a limit."""
    return min(map(_limit, _groups(root)), default=math.inf)


def _groups(root: Path) -> Iterator[Path]:
    """The folders of this process's control groups and of those above them, versions 1 and 2.

    A container often sees its own group as the root, under whatever name the host has for it, so
    that folders of that name may not exist.
    """
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if not controllers:  # version 2
            tops = [mount]
        elif "cpu" in controllers.split(","):
            tops = [mount / "cpu", mount / controllers]
        else:
            continue
        for top in tops:
            below = Path(group.lstrip("/"))
            yield from (top / folder for folder in (below, *below.parents))


def _limit(group: Path) -> float:
    """The CPUs that one control group grants, infinite if it says nothing."""
    if words := _read(group / "cpu.max").split():
        quota, period = words
    else:
        quota = _read(group / "cpu.cfs_quota_us").strip()
        period = _read(group / "cpu.cfs_period_us").strip()
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else math.inf


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
