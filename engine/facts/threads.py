"""How many threads compute: what the process may use, what the machine has, and the choice.

Knows no tensors and starts no thread; device.py puts the choice into force.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from .cgroups import control_groups
from .errors import StartError

_CPUS = "sys/devices/system/cpu"
# The second name is of older kernels; it does not say what groups above have taken away.
_CPUSETS = {
    "v1": ("cpuset.effective_cpus", "cpuset.cpus"),
    "v2": ("cpuset.cpus.effective", "cpuset.cpus"),
}


@dataclass(frozen=True, slots=True)
class CpuLimit:
    cpus: float  # a quota need not be a whole number
    name: str  # as the log says it, its number included


@dataclass(frozen=True, slots=True)
class CpuLimits:
    """What may be used is the least of them."""

    narrower: tuple[CpuLimit, ...]  # than the machine: quotas, affinity mask, cpusets
    logical: CpuLimit  # the machine's
    cores: CpuLimit  # of those that mask and cpusets leave


@dataclass(frozen=True, slots=True)
class Threads:
    count: int
    why: str  # in words, for the log


def choose_threads(wanted: int | None, limits: CpuLimits) -> Threads:
    """`wanted`, or where it is None a thread for each core that may be used.

    One core is left to the rest of the process where that leaves more than two. Raises StartError
    where more are wanted than can run.
    """
    if wanted is None:
        least = _least(*limits.narrower, limits.cores)
        count = max(1, math.floor(least.cpus))
        if count - 1 > 2:
            return Threads(count - 1, f"{least.name}, less one")
        return Threads(count, least.name)
    least = _least(*limits.narrower, limits.logical)
    most = max(1, math.ceil(least.cpus))
    if wanted > most:
        raise StartError(
            f"--threads {wanted}: at most {most} can run here ({least.name}); lower it, or leave"
            " it out"
        )
    return Threads(wanted, f"--threads {wanted}")


def _least(*limits: CpuLimit) -> CpuLimit:
    return min(limits, key=lambda limit: limit.cpus)


def cpu_limits(root: Path = Path("/"), mask: frozenset[int] | None = None) -> CpuLimits:
    """As they are now, for the calling thread. `root` is where proc and sys are.

    `mask` are the CPUs that it may run on; None: asked of the system.
    """
    machine = len(_cpu_list(root / _CPUS / "online") or ()) or os.cpu_count() or 1
    usable = frozenset(os.sched_getaffinity(0)) if mask is None else mask
    narrower = list(_quotas(root))
    cpusets = [(path, cpus) for path, cpus in _cpusets(root) if len(cpus) < machine]
    narrower += [CpuLimit(len(cpus), f"cpuset of {len(cpus)} in {path}") for path, cpus in cpusets]
    if len(usable) < machine:  # by a cpuset, where that is as narrow
        narrower.append(CpuLimit(len(usable), f"affinity mask of {len(usable)}"))
    for _, cpus in cpusets:
        usable = usable & cpus or usable
    cores = _cores(root, usable)
    within = f" in {len(usable)} allowed CPUs" if len(usable) < machine else ""
    return CpuLimits(
        tuple(narrower),
        CpuLimit(machine, f"{machine} logical CPUs"),
        CpuLimit(cores, f"{cores} physical core{'s' if cores > 1 else ''}{within}"),
    )


def _cores(root: Path, usable: frozenset[int]) -> int:
    """Two hyperthreads of a core are one."""
    siblings = [
        _cpu_list(root / _CPUS / f"cpu{cpu}/topology/thread_siblings_list") for cpu in usable
    ]
    if None not in siblings:
        return len(set(siblings))
    return min(len(usable), psutil.cpu_count(logical=False) or len(usable))


def _quotas(root: Path) -> Iterator[CpuLimit]:
    for version, folder in control_groups("cpu", root):
        path = folder / ("cpu.max" if version == "v2" else "cpu.cfs_quota_us")
        try:
            words = path.read_text().split()
            if version == "v1":
                words += (folder / "cpu.cfs_period_us").read_text().split()
            quota_us, period_us = map(int, words)
        except (OSError, ValueError):  # no such controller, or "max"
            continue
        if quota_us > 0 and period_us > 0:  # -1: none
            cpus = quota_us / period_us
            yield CpuLimit(cpus, f"cpu quota of {round(cpus, 2)} in {path}")


def _cpusets(root: Path) -> Iterator[tuple[Path, frozenset[int]]]:
    for version, folder in control_groups("cpuset", root):
        for path in (folder / name for name in _CPUSETS[version]):
            cpus = _cpu_list(path)
            if cpus:
                yield path, cpus
                break


def _cpu_list(path: Path) -> frozenset[int] | None:
    """Of '0-3,8'; empty where the file is. None where there is no such list."""
    try:
        parts = [part.partition("-") for part in path.read_text().strip().split(",") if part]
        return frozenset(
            cpu for low, _, high in parts for cpu in range(int(low), int(high or low) + 1)
        )
    except (OSError, ValueError):
        return None
