"""The CPUs of a process on a host: physical cores, its affinity, the quota of its control groups.

A quota bounds CPU time, not CPUs: all CPUs are there, but once the group's threads have run for
their share of a period (100 ms by default) all of them stand still until the next begins.
"""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from edgekit.devices.hosts.host import Host
from edgekit.devices.hosts.local import LOCAL
from edgekit.devices.probe.rootfs import CPU_FOLDER, key_values, read_int, read_text

_SPINS = "10000"


@dataclass(frozen=True)
class QuotaGroup:
    """A control group with a quota: `cpus` of CPU time per time, and its folder."""

    cpus: float
    folder: str

    def throttled_seconds(self, host: Host = LOCAL) -> float | None:
        """Return for how long the quota has held the group's CPUs in all; None if unreadable.

        It is the sum over the CPUs on which a thread of the group was stopped.
        """
        counters = key_values(
            (read_text(host, f"{self.folder}/cpu.stat") or "").splitlines(), separator=" "
        )
        for name, per_second in (("throttled_usec", 1e6), ("throttled_time", 1e9)):  # v2, v1
            if counters.get(name, "").isdigit():
                return int(counters[name]) / per_second
        return None


def default_threads(host: Host = LOCAL) -> int:
    """Return the threads an engine gets where nobody says: one per physical core, by the quota."""
    usable = usable_cpus(host)
    return min(usable, physical_cores(host.cpus(), host) or usable)


def usable_cpus(host: Host = LOCAL) -> int:
    """Return how many CPUs a process can keep busy all the time, by its affinity and its quota.

    Part of a CPU counts for nothing beside a whole one. Two threads under a quota of 1.5 are
    stopped in turn and wait for each other: lfm2-tiny decoded with 0.7 of the speed of one thread,
    under a quota of 0.5 with half of it (llama.cpp and ExecuTorch, Linux 6.18).
    """
    cpus, quota = len(host.cpus()), cpu_quota(host)
    return cpus if quota is None else min(cpus, max(1, math.floor(quota)))


def share_cpus_well() -> None:
    """Let the OpenMP libraries that are loaded from now on leave CPUs to others; users may differ.

    torch and llama.cpp bring OpenMP. By GCC's default a thread that waits for the others spins
    300,000 times before it sleeps, and takes the CPU from the very thread that it waits for where
    there is another load. Beside three endless loops on each of two CPUs, which leave a fourth, 7 %
    of LFM2-350M's decoding speed in llama.cpp were left, with 10,000 spins 20 %; no spin at all is
    far slower on quiet CPUs (`benchmarks/beside_load.py`). Under a quota there are no more threads
    than it grants.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    if cpu_quota() is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(default_threads()))


def physical_cores(cpus: Iterable[int], host: Host = LOCAL) -> int | None:
    """Return the number of physical cores among logical CPUs; None if one's is unreadable.

    Two hardware threads of one core share its multipliers and its path to memory, so a second
    one slows matrix work down more often than not. Sets of siblings are counted, for `core_id`
    repeats across clusters.
    """
    siblings = {
        read_text(host, f"{CPU_FOLDER}/cpu{cpu}/topology/thread_siblings_list") for cpu in cpus
    }
    return None if not siblings or None in siblings else len(siblings)


def cpu_quota(host: Host = LOCAL) -> float | None:
    """Return how many CPUs' time a process may use; None without a quota."""
    return min((group.cpus for group in quota_groups(host)), default=None)


def quota_groups(host: Host = LOCAL) -> tuple[QuotaGroup, ...]:
    """Return the groups with a quota that hold the process, in both versions' hierarchies.

    Every ancestor's quota holds too, as far up as the process can see.
    """
    found = ((folder, _quota(host, folder)) for folder in _group_folders(host))
    return tuple(QuotaGroup(cpus, folder) for folder, cpus in found if cpus is not None)


def throttled_seconds(groups: Iterable[QuotaGroup], host: Host = LOCAL) -> float | None:
    """Return for how long quotas have held a process back, as the group that did most says."""
    seconds = (group.throttled_seconds(host) for group in groups)
    return max((each for each in seconds if each is not None), default=None)


def _quota(host: Host, folder: str) -> float | None:
    """Read `cpu.max` (v2: `50000 100000` or `max 100000`) or the two files of v1 (-1 is none)."""
    words = (read_text(host, f"{folder}/cpu.max") or "").split()
    if len(words) == 2:
        quota = int(words[0]) if words[0].isdigit() else None
        period = int(words[1]) if words[1].isdigit() else None
    else:
        quota = read_int(host, f"{folder}/cpu.cfs_quota_us")
        period = read_int(host, f"{folder}/cpu.cfs_period_us")
    return quota / period if quota and period and quota > 0 and period > 0 else None


def _group_folders(host: Host) -> Iterator[str]:
    """Yield the folders of the process's groups that may bound the CPU, each before its parent."""
    paths = dict(_memberships(host))
    for is_v2, top, mount in _mounts(host):
        path = paths.get(is_v2)
        if path is None:
            continue
        # A container may see a part of the tree only (`top` is mounted), and its path from outside.
        inner = path.relative_to(top) if path.is_relative_to(top) else PurePosixPath()
        if ".." in inner.parts:  # the process is outside the part that this namespace shows
            inner = PurePosixPath()
        for part in (inner, *inner.parents):
            yield str(mount / part)


def _memberships(host: Host) -> Iterator[tuple[bool, PurePosixPath]]:
    """Read /proc/self/cgroup, `number:controllers:path`: v2's line has no controllers."""
    for line in (read_text(host, "/proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield True, PurePosixPath(path)
        elif "cpu" in controllers.split(","):
            yield False, PurePosixPath(path)


def _mounts(host: Host) -> Iterator[tuple[bool, PurePosixPath, PurePosixPath]]:
    """Read from /proc/self/mountinfo (proc(5)) what is mounted where: v2's tree, v1's of `cpu`."""
    for line in (read_text(host, "/proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        top, mount = PurePosixPath(fields[3]), PurePosixPath(fields[4])
        if kind[0] == "cgroup2":
            yield True, top, mount
        elif kind[0] == "cgroup" and "cpu" in kind[2].split(","):
            yield False, top, mount
