"""What the kernel says of this process's CPU time and memory around a timed region (/proc).

The worker reads it, on the machine where it runs.
"""

import os
import time
from dataclasses import dataclass

from edgekit.devices.cpus import quota_groups, throttled_seconds
from edgekit.devices.hosts.local import LOCAL
from edgekit.devices.probe.rootfs import key_values, read_text
from edgekit.runtime.bench.record import Interference


@dataclass(frozen=True)
class Clocks:
    """Seconds since some fixed moment.

    `wall`; `own` CPU time of this process; `busy` time of all CPUs, stolen time included;
    `waited` time in which threads of this process were ready but not running; `throttled` time in
    which the quota of a control group held CPUs of the group back. None where the kernel does not
    say, or there is no quota.
    """

    wall: float
    own: float
    busy: float | None
    waited: float | None
    throttled: float | None

    @classmethod
    def read(cls) -> "Clocks":
        """Read all of them now."""
        return cls(
            wall=time.perf_counter(),
            own=time.process_time(),
            busy=_busy_seconds(),
            waited=_waited_seconds(),
            throttled=throttled_seconds(quota_groups()),
        )


def interference(before: Clocks, after: Clocks, threads: int) -> Interference:
    """Return what else ran between two readings, as shares of the wall time between them."""
    wall = after.wall - before.wall
    own = after.own - before.own
    other = waited = throttled = None
    if before.busy is not None and after.busy is not None:
        cpus = os.cpu_count() or 1
        # /proc/stat counts in ticks: a tick per CPU is the reading's error, not another load.
        slack = cpus / os.sysconf("SC_CLK_TCK")
        other = _share(after.busy - before.busy - own - slack, wall * cpus)
    if before.waited is not None and after.waited is not None:
        waited = _share(after.waited - before.waited, wall * threads)
    if before.throttled is not None and after.throttled is not None:
        throttled = _share(after.throttled - before.throttled, wall * threads)
    return Interference(own / (wall * threads), other, waited, throttled)


def _share(part: float, whole: float) -> float:
    """Keep a share within 0 and 1: the kernel books a wait when it ends, or when its thread does.

    So a short region can be given more than its own time, or lose what an ended thread had.
    """
    return min(1.0, max(0.0, part / whole))


class MemoryUse:
    """Memory of this process, what is swapped out included, and the most that was ever read.

    The kernel keeps the peak of resident memory alone, so what was swapped out counts as often as
    it is read.
    """

    def __init__(self) -> None:
        """Start without a reading."""
        self._peak = 0

    def read(self) -> dict[str, int | None]:
        """Return `bytes` now and `peak_bytes`; None where /proc does not say."""
        lines = (read_text(LOCAL, "/proc/self/status") or "").splitlines()
        sizes = {
            name: int(value.split()[0]) * 1024
            for name, value in key_values(lines).items()
            if name in ("VmHWM", "VmRSS", "VmSwap")
        }
        if not sizes:
            return {"bytes": None, "peak_bytes": None}
        now = sizes.get("VmRSS", 0) + sizes.get("VmSwap", 0)
        self._peak = max(self._peak, now, sizes.get("VmHWM", 0))
        return {"bytes": now, "peak_bytes": self._peak}


def _busy_seconds() -> float | None:
    """Sum user, nice, system, irq, softirq and steal time of all CPUs (proc_stat(5))."""
    fields = (read_text(LOCAL, "/proc/stat") or "").partition("\n")[0].split()
    if len(fields) < 9:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _waited_seconds() -> float | None:
    """Sum the run-queue delay of this process's threads, the second field of `schedstat`."""
    folder = "/proc/self/task"
    texts = [read_text(LOCAL, f"{folder}/{task}/schedstat") for task in LOCAL.entries(folder)]
    fields = [text.split() for text in texts if text is not None]
    delays = [int(field[1]) for field in fields if len(field) == 3]
    return sum(delays) / 1e9 if delays else None
