"""What a machine is: CPU, ISA features, caches, memory, page size, operating system.

Everything is read from /proc, /sys and /etc of a host, so another machine or a recorded tree is
probed like this one; serial numbers and host names are not read.
"""

import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from edgekit.devices.cpus import cpu_quota, physical_cores
from edgekit.devices.hosts.host import Host
from edgekit.devices.hosts.local import LOCAL
from edgekit.devices.probe.conditions import Conditions, conditions
from edgekit.devices.probe.cpuinfo import Processor, architecture, isa_features, read_processors
from edgekit.devices.probe.rootfs import (
    CPU_FOLDER,
    key_values,
    list_folder,
    meminfo_bytes,
    read_int,
    read_scaled,
    read_text,
)

__all__ = ["Cache", "Cluster", "Conditions", "Machine", "conditions", "probe"]

_AUXV_PAGE_SIZE = 6  # AT_PAGESZ of the kernel's include/uapi/linux/auxvec.h
_CACHE_UNITS = {"K": 1024, "M": 1024**2, "G": 1024**3}


@dataclass(frozen=True)
class Cluster:
    """The online logical CPUs that share core type, clock range and governor."""

    core: str | None
    cpus: tuple[int, ...]
    min_mhz: float | None
    max_mhz: float | None
    governor: str | None


@dataclass(frozen=True)
class Cache:
    """One kind of cache: `bytes` of a single instance, and how many instances there are."""

    level: int
    kind: str
    bytes: int
    instances: int


@dataclass(frozen=True)
class Machine:
    """The facts of one machine; None (and for `caches` empty) is what could not be read.

    `cpu_quota` is how many CPUs' time the process's control groups grant, None without a quota.
    """

    device: str | None
    cpu: str | None
    vendor: str | None
    architecture: str | None
    isa: tuple[str, ...] | None
    clusters: tuple[Cluster, ...]
    physical_cores: int | None
    logical_cores: int | None
    cpu_quota: float | None
    caches: tuple[Cache, ...]
    ram_bytes: int | None
    swap_bytes: int | None
    page_bytes: int | None
    os: str | None
    kernel: str | None
    python: str | None
    conditions: Conditions

    @property
    def last_level_cache_bytes(self) -> int | None:
        """Return all instances of the highest cache level together; None if unreadable."""
        if not self.caches:
            return None
        last = max(cache.level for cache in self.caches)
        return sum(cache.bytes * cache.instances for cache in self.caches if cache.level == last)

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as JSON's types."""
        return asdict(self)


def probe(host: Host = LOCAL) -> Machine:
    """Read a machine's facts; `python` is the version of the one with edgekit in it."""
    processors = read_processors(host)
    clusters = _clusters(host, processors)
    memory = meminfo_bytes(host)
    return Machine(
        device=_device(host),
        cpu=_cpu_name(clusters, processors),
        vendor=processors[0].vendor if processors else None,
        architecture=architecture(host, processors),
        isa=isa_features(processors),
        clusters=clusters,
        physical_cores=physical_cores((p.cpu for p in processors), host),
        logical_cores=len(processors) or None,
        cpu_quota=cpu_quota(host),
        caches=_caches(host, processors),
        ram_bytes=memory.get("MemTotal"),
        swap_bytes=memory.get("SwapTotal"),
        page_bytes=_page_bytes(host),
        os=_os_name(host),
        kernel=_kernel(host),
        python=None if host.python is None else host.python.version,
        conditions=conditions(host),
    )


def _device(host: Host) -> str | None:
    """Boards name themselves in the device tree, PCs in DMI."""
    for path in ("/proc/device-tree/model", "/sys/class/dmi/id/product_name"):
        name = read_text(host, path)
        if name is not None:
            return name
    return None


def _clusters(host: Host, processors: tuple[Processor, ...]) -> tuple[Cluster, ...]:
    grouped: dict[tuple[str | None, float | None, float | None, str | None], list[int]] = {}
    for processor in processors:
        folder = f"{CPU_FOLDER}/cpu{processor.cpu}/cpufreq"
        key = (
            processor.core,
            read_scaled(host, f"{folder}/cpuinfo_min_freq", 1000),
            read_scaled(host, f"{folder}/cpuinfo_max_freq", 1000),
            read_text(host, f"{folder}/scaling_governor"),
        )
        grouped.setdefault(key, []).append(processor.cpu)
    return tuple(
        Cluster(core, tuple(cpus), low, high, governor)
        for (core, low, high, governor), cpus in grouped.items()
    )


def _cpu_name(clusters: tuple[Cluster, ...], processors: tuple[Processor, ...]) -> str | None:
    """x86 names the whole processor; on ARM the clusters together are its description."""
    if not processors or processors[0].arm_ids is None:
        return processors[0].core if processors else None
    return " + ".join(f"{len(cluster.cpus)}x {cluster.core}" for cluster in clusters)


def _caches(host: Host, processors: tuple[Processor, ...]) -> tuple[Cache, ...]:
    """Count each cache once, however many CPUs list it."""
    shared = {entry for p in processors for entry in _cpu_caches(host, p.cpu)}
    kinds = [(level, kind, size) for level, kind, size, _ in shared]
    return tuple(
        Cache(level, kind, size, kinds.count((level, kind, size)))
        for level, kind, size in sorted(set(kinds))
    )


def _cpu_caches(host: Host, cpu: int) -> Iterator[tuple[int, str, int, str]]:
    for index in list_folder(host, f"{CPU_FOLDER}/cpu{cpu}/cache", "index"):
        folder = f"{CPU_FOLDER}/cpu{cpu}/cache/{index}"
        level = read_int(host, f"{folder}/level")
        kind = read_text(host, f"{folder}/type")
        size = _cache_bytes(read_text(host, f"{folder}/size"))
        users = read_text(host, f"{folder}/shared_cpu_list")
        if level is not None and kind is not None and size is not None and users is not None:
            yield level, kind.lower(), size, users


def _cache_bytes(text: str | None) -> int | None:
    """Read sysfs' `512K`."""
    if text is None or text[-1] not in _CACHE_UNITS or not text[:-1].isdigit():
        return None
    return int(text[:-1]) * _CACHE_UNITS[text[-1]]


def _page_bytes(host: Host) -> int | None:
    """Read AT_PAGESZ of a process's auxiliary vector: pairs of 64 or of 32 bits (proc(5))."""
    raw = host.read("/proc/self/auxv") or b""
    for words in ("<QQ", "<II"):
        pair = struct.Struct(words)
        whole = raw[: len(raw) // pair.size * pair.size]
        found: int | None = dict(pair.iter_unpack(whole)).get(_AUXV_PAGE_SIZE)
        if found is not None:
            return found
    return None


def _os_name(host: Host) -> str | None:
    """Return the distribution's own name, else the kernel's (`Linux`)."""
    release = key_values((read_text(host, "/etc/os-release") or "").splitlines(), separator="=")
    name = release.get("PRETTY_NAME", "").strip("\"'")
    return name or read_text(host, "/proc/sys/kernel/ostype")


def _kernel(host: Host) -> str | None:
    return read_text(host, "/proc/sys/kernel/osrelease")
